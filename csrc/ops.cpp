// Names and types of the native ops; each backend registers its own implementation. What they compute is written down
// in the docstring of triplet_loss (triplet.py).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(oneshot, m) {
  // loss () or (B,); count (), the anchors or triplets that a mean is taken over; positive, negative (B,) rows of
  // candidates, the others' after the batch's own, -1 where an anchor takes no part (mining "all": everywhere)
  m.def(
      "triplet_forward(Tensor embeddings, Tensor labels, Tensor? other_embeddings, Tensor? other_labels, "
      "int distance, int mining, bool soft_margin, float margin, float temperature, int reduction) "
      "-> (Tensor loss, Tensor count, Tensor positive, Tensor negative)");
  // gradients of embeddings and of other_embeddings (empty where there are none), from that of the loss
  m.def(
      "triplet_backward(Tensor grad, Tensor embeddings, Tensor labels, Tensor? other_embeddings, "
      "Tensor? other_labels, Tensor count, Tensor positive, Tensor negative, "
      "int distance, int mining, bool soft_margin, float margin, float temperature, int reduction) "
      "-> (Tensor grad_embeddings, Tensor grad_others)");
  // both at once, for a loss that is reduced: its gradient for an upstream gradient of 1; no grad_others without them
  m.def(
      "triplet_loss_and_gradient(Tensor embeddings, Tensor labels, Tensor? other_embeddings, Tensor? other_labels, "
      "int distance, int mining, bool soft_margin, float margin, float temperature, int reduction) "
      "-> (Tensor loss, Tensor grad_embeddings, Tensor? grad_others)");
}
