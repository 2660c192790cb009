// Names and types of the native ops; each backend registers its own implementation. What they compute is written down
// in the docstring of triplet_loss (triplet.py).
//
// candidates (N, D): the batch's rows, then the others'; the first `anchors` are the anchors. labels (N,) int64. The
// first `gradient_rows` candidates get a gradient, anchors at least: nothing is computed for the rest.
#include <torch/csrc/stable/library.h>

#include "triplet.h"

STABLE_TORCH_LIBRARY(oneshot, m) {
  // loss () or (anchors,); count (), the anchors or triplets that a mean is taken over; positive, negative (anchors,)
  // rows of candidates, -1 where an anchor takes no part (mining "all": everywhere). gradient_rows is for the backward
  // pass.
  m.def("triplet_forward(" TRIPLET_BATCH TRIPLET_OPTIONS
        "(Tensor loss, Tensor count, Tensor positive, Tensor negative)");
  // gradient (gradient_rows, D) from that of the loss
  m.def("triplet_backward(Tensor grad, " TRIPLET_BATCH
        "Tensor count, Tensor positive, Tensor negative, " TRIPLET_OPTIONS "Tensor");
  // both at once, for a loss that is reduced: its gradient for an upstream gradient of 1
  m.def("triplet_loss_and_gradient(" TRIPLET_BATCH TRIPLET_OPTIONS "(Tensor loss, Tensor gradient)");
}
