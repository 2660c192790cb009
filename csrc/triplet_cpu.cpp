// The native ops on the CPU: tensors to pointers, classes to numbers, the choice of kernels by type, the reduction.
#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "triplet_cpu.h"

namespace triplet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

void check_rows(const Tensor& embeddings, const Tensor& labels, const char* name) {
  require(embeddings.dim() == 2, name, " must be (B, D), got ", embeddings.dim(), " dimensions");
  require(labels.dim() == 1 && labels.size(0) == embeddings.size(0), "labels of ", name, " must be (",
          embeddings.size(0), ",), got ", labels.dim(), " dimensions and ", labels.numel(), " values");
  require(labels.scalar_type() == ScalarType::Long, "labels must be int64");
  require(embeddings.is_contiguous() && labels.is_contiguous(), name, " and labels must be contiguous");
  require(embeddings.is_cpu() && labels.is_cpu(), name, " and labels must be on the CPU");
}

// A batch with what it points to.
template <typename In>
struct OwningBatch : Batch<In> {
  std::vector<int32_t> memory;  // class_of, order, starts

  OwningBatch(const Tensor& embeddings, const Tensor& labels, const MaybeTensor& other_embeddings,
              const MaybeTensor& other_labels) {
    check_rows(embeddings, labels, "embeddings");
    this->own = embeddings.const_data_ptr<In>();
    this->rows = embeddings.size(0);
    this->width = embeddings.size(1);
    this->others = nullptr;
    this->other_rows = 0;
    require(other_embeddings.has_value() == other_labels.has_value(), "others need both embeddings and labels");
    if (other_embeddings) {
      check_rows(*other_embeddings, *other_labels, "others");
      require(other_embeddings->size(1) == this->width, "others must be ", this->width, " wide, got ",
              other_embeddings->size(1));
      require(other_embeddings->scalar_type() == embeddings.scalar_type(), "others must have the type of embeddings");
      this->others = other_embeddings->template const_data_ptr<In>();
      this->other_rows = other_embeddings->size(0);
    }
    require(this->rows > 0 && this->width > 0, "embeddings must not be empty, got (", this->rows, ", ", this->width,
            ")");
    require(this->candidates() < std::numeric_limits<int32_t>::max() / 2, "at most 2^30 rows, got ",
            this->candidates());
    number_classes(labels.const_data_ptr<int64_t>(), other_labels ? other_labels->const_data_ptr<int64_t>() : nullptr);
  }

  void number_classes(const int64_t* labels, const int64_t* other_labels) {
    const int64_t n = this->candidates();
    memory.resize(3 * n + 1);
    int32_t *class_of = memory.data(), *order = class_of + n, *starts = order + n;
    const auto label = [&](int32_t j) { return j < this->rows ? labels[j] : other_labels[j - this->rows]; };
    std::iota(order, order + n, 0);
    const auto before = [&](int32_t a, int32_t b) { return label(a) != label(b) ? label(a) < label(b) : a < b; };
    if (!std::is_sorted(order, order + n, before)) std::sort(order, order + n, before);
    int32_t classes = 0;
    for (int32_t at = 0; at < n; ++at) {
      if (at == 0 || label(order[at]) != label(order[at - 1])) starts[classes++] = at;
      class_of[order[at]] = classes - 1;
    }
    starts[classes] = int32_t(n);
    this->class_of = class_of;
    this->order = order;
    this->starts = starts;
    this->classes = classes;
  }
};

template <typename In>
void fill_nan(const Batch<In>& batch, In* own, In* others) {
  std::fill_n(own, batch.rows * batch.width, In(std::numeric_limits<float>::quiet_NaN()));
  if (others) std::fill_n(others, batch.other_rows * batch.width, In(std::numeric_limits<float>::quiet_NaN()));
}

Threads pytorch_threads(int64_t work) {  // in multiplications and additions
  const int64_t count = work < (2 << 20) ? 1 : int64_t(torch::stable::get_num_threads());  // waking threads costs 5 us
  return {count, [](int64_t n, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

// f(In(), T()) for the embeddings' type and that of its arithmetic
template <typename F>
void by_type(const Tensor& embeddings, F&& f) {
  switch (embeddings.scalar_type()) {
    case ScalarType::Double:
      return f(double(), double());
    case ScalarType::Float:
      return f(float(), float());
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16(), float());
    case ScalarType::Half:
      return f(torch::headeronly::Half(), float());
    default:
      require(false, "embeddings must be float64, float32, bfloat16 or float16");
  }
}

// The batch's loss into `loss`: (rows,) for Reduction::none, else one value. The result's fields are the caller's; NaN
// everywhere and a total of -1 if an embedding is not finite.
template <typename In, typename T>
void run_forward(const OwningBatch<In>& batch, const Settings& settings, Result<In, T>& result, T* loss) {
  const Threads threads = pytorch_threads(batch.rows * batch.candidates() * batch.width);
  if (!kernels<In, T>().forward(batch, settings, threads, result)) {
    std::fill_n(result.losses, batch.rows, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(result.positive, batch.rows, -1);
    std::fill_n(result.negative, batch.rows, -1);
    if (result.grad_own) fill_nan(batch, result.grad_own, result.grad_others);
    result.total = -1;  // tells the backward pass
  }
  if (settings.reduction == Reduction::none) return;
  double sum = std::accumulate(result.losses, result.losses + batch.rows, 0.0);
  if (settings.reduction == Reduction::mean && result.total > 0) sum /= double(result.total);
  *loss = T(sum);
}

ScalarType loss_type(const Tensor& embeddings) {
  return embeddings.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A tensor straight from its allocator: torch::stable::new_empty looks up its operator by name each time.
Tensor allocate(ScalarType type, int64_t dimensions, const int64_t* sizes) {
  const int64_t strides[2] = {dimensions == 2 ? sizes[1] : 1, 1};
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dimensions, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

Tensor scalar(ScalarType type) { return allocate(type, 0, nullptr); }
Tensor vector(ScalarType type, int64_t n) { return allocate(type, 1, &n); }

Tensor gradient_of(const Tensor& embeddings) {
  const int64_t sizes[2] = {embeddings.size(0), embeddings.size(1)};
  return allocate(embeddings.scalar_type(), 2, sizes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor embeddings, Tensor labels, MaybeTensor other_embeddings,
                                                   MaybeTensor other_labels, int64_t distance, int64_t mining,
                                                   bool soft_margin, double margin, double temperature,
                                                   int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  const bool each = settings.reduction == Reduction::none;
  Tensor loss, count = scalar(ScalarType::Long), positive, negative;
  by_type(embeddings, [&](auto in, auto t) {
    using In = decltype(in);
    using T = decltype(t);
    const OwningBatch<In> batch(embeddings, labels, other_embeddings, other_labels);
    positive = vector(ScalarType::Long, batch.rows);
    negative = vector(ScalarType::Long, batch.rows);
    loss = each ? vector(loss_type(embeddings), batch.rows) : scalar(loss_type(embeddings));
    T* const reduced = loss.mutable_data_ptr<T>();
    std::unique_ptr<T[]> own(each ? nullptr : new T[batch.rows]);
    Result<In, T> result{each ? reduced : own.get(), positive.mutable_data_ptr<int64_t>(),
                         negative.mutable_data_ptr<int64_t>()};
    run_forward(batch, settings, result, reduced);
    *count.mutable_data_ptr<int64_t>() = result.total;
  });
  return {loss, count, positive, negative};
}

std::tuple<Tensor, Tensor, MaybeTensor> loss_and_gradient(Tensor embeddings, Tensor labels,
                                                          MaybeTensor other_embeddings, MaybeTensor other_labels,
                                                          int64_t distance, int64_t mining, bool soft_margin,
                                                          double margin, double temperature, int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  require(settings.reduction != Reduction::none, "a loss that is not reduced has no one gradient");
  Tensor loss, grad_own;
  MaybeTensor grad_others;
  by_type(embeddings, [&](auto in, auto t) {
    using In = decltype(in);
    using T = decltype(t);
    const OwningBatch<In> batch(embeddings, labels, other_embeddings, other_labels);
    loss = scalar(loss_type(embeddings));
    grad_own = gradient_of(embeddings);
    if (other_embeddings) grad_others = gradient_of(*other_embeddings);
    std::unique_ptr<T[]> losses(new T[batch.rows]);
    std::unique_ptr<int64_t[]> mined(new int64_t[2 * batch.rows]);
    Result<In, T> result{losses.get(),
                         mined.get(),
                         mined.get() + batch.rows,
                         0,
                         grad_own.mutable_data_ptr<In>(),
                         grad_others ? grad_others->mutable_data_ptr<In>() : nullptr};
    run_forward(batch, settings, result, loss.mutable_data_ptr<T>());
  });
  return {loss, grad_own, grad_others};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor embeddings, Tensor labels, MaybeTensor other_embeddings,
                                    MaybeTensor other_labels, Tensor count, Tensor positive, Tensor negative,
                                    int64_t distance, int64_t mining, bool soft_margin, double margin,
                                    double temperature, int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  Tensor grad_own, grad_others;
  by_type(embeddings, [&](auto in, auto t) {
    using In = decltype(in);
    using T = decltype(t);
    const OwningBatch<In> batch(embeddings, labels, other_embeddings, other_labels);
    grad_own = gradient_of(embeddings);
    grad_others = other_embeddings ? gradient_of(*other_embeddings) : vector(embeddings.scalar_type(), 0);
    In* own = grad_own.mutable_data_ptr<In>();
    In* others = other_embeddings ? grad_others.mutable_data_ptr<In>() : nullptr;
    const int64_t total = *count.const_data_ptr<int64_t>();
    if (total < 0) return fill_nan(batch, own, others);
    const T* given = grad.const_data_ptr<T>();
    std::unique_ptr<T[]> each(new T[batch.rows]);
    for (int64_t i = 0; i < batch.rows; ++i) {
      each[i] = settings.reduction == Reduction::none ? given[i * grad.stride(0)] : given[0];
      if (settings.reduction == Reduction::mean) each[i] /= T(std::max<int64_t>(total, 1));
    }
    const int64_t work = (settings.mining == Mining::all ? batch.rows : 8) * batch.candidates() * batch.width;
    kernels<In, T>().backward(batch, settings, pytorch_threads(work), each.get(), positive.const_data_ptr<int64_t>(),
                              negative.const_data_ptr<int64_t>(), own, others);
  });
  return {grad_own, grad_others};
}

}  // namespace
}  // namespace triplet

STABLE_TORCH_LIBRARY_IMPL(oneshot, CPU, m) {
  m.impl("triplet_forward", TORCH_BOX(&triplet::forward));
  m.impl("triplet_backward", TORCH_BOX(&triplet::backward));
  m.impl("triplet_loss_and_gradient", TORCH_BOX(&triplet::loss_and_gradient));
}
