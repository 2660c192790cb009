// Checks of the ops' arguments, for both backends.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "triplet.h"

namespace triplet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType loss_type(const Tensor& candidates) {
  return candidates.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_beside(const char* name, const Tensor& tensor, const Tensor& candidates) {
  require(tensor.is_cuda() == candidates.is_cuda() && tensor.get_device_index() == candidates.get_device_index(), name,
          " must be on the device of candidates");
  require(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_integers(const char* name, const Tensor& tensor, int64_t count, const Tensor& candidates) {
  require(tensor.scalar_type() == ScalarType::Long, name, " must be int64");
  require(tensor.dim() == 1 && tensor.size(0) == count, name, " must be (", count, ",), got ", tensor.dim(),
          " dimensions and ", tensor.numel(), " values");
  check_beside(name, tensor, candidates);
}

inline void check_batch(const Tensor& candidates, const Tensor& labels, int64_t anchors) {
  require(candidates.dim() == 2 && candidates.numel() > 0, "candidates must be (N, D), not empty, got ",
          candidates.dim(), " dimensions and ", candidates.numel(), " values");
  require(candidates.size(0) < 1 << 30 && candidates.size(1) < 1 << 30, "at most 2^30 rows and columns, got ",
          candidates.size(0), " and ", candidates.size(1));
  check_beside("candidates", candidates, candidates);
  check_integers("labels", labels, candidates.size(0), candidates);
  require(anchors > 0 && anchors <= candidates.size(0), "anchors must be in 1..", candidates.size(0), ", got ",
          anchors);
}

inline void check_gradient_rows(int64_t gradient_rows, int64_t anchors, const Tensor& candidates) {
  require(gradient_rows >= anchors && gradient_rows <= candidates.size(0), "gradient_rows must be in ", anchors, "..",
          candidates.size(0), ", got ", gradient_rows);
}

inline void check_gradient_of_loss(const Tensor& grad, const Tensor& candidates, int64_t anchors, Reduction reduction) {
  const bool each = reduction == Reduction::none;
  require(grad.scalar_type() == loss_type(candidates) && grad.dim() == (each ? 1 : 0) &&
              grad.numel() == (each ? anchors : 1),
          "the gradient must have the shape and type of the loss");
  require(grad.is_cuda() == candidates.is_cuda() && grad.get_device_index() == candidates.get_device_index(),
          "the gradient must be on the device of candidates");
}

// What a backward pass gets from the forward pass of the same batch and from upstream.
inline void check_backward(const Tensor& grad, const Tensor& candidates, const Tensor& count, const Tensor& positive,
                           const Tensor& negative, int64_t anchors, Reduction reduction) {
  check_gradient_of_loss(grad, candidates, anchors, reduction);
  require(count.scalar_type() == ScalarType::Long && count.numel() == 1, "count must be one int64");
  check_integers("positive", positive, anchors, candidates);
  check_integers("negative", negative, anchors, candidates);
}

}  // namespace triplet
