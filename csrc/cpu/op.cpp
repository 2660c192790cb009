// The native ops on the CPU: tensors to pointers, classes to numbers, the choice of kernels by processor and type, the
// reduction.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/kernels.h"

namespace triplet {
namespace {

// A batch with what it points to.
template <typename In>
struct OwningBatch : Batch<In> {
  std::vector<int32_t> memory;  // class_of, order, starts

  OwningBatch(const Tensor& candidates, const Tensor& labels, int64_t anchors) {
    check_batch(candidates, labels, anchors);
    this->x = candidates.const_data_ptr<In>();
    this->anchors = anchors;
    this->candidates = candidates.size(0);
    this->width = candidates.size(1);
    number_classes(labels.const_data_ptr<int64_t>());
  }

  void number_classes(const int64_t* label) {
    const int64_t n = this->candidates;
    memory.resize(3 * n + 1);
    int32_t *class_of = memory.data(), *order = class_of + n, *starts = order + n;
    std::iota(order, order + n, 0);
    const auto before = [&](int32_t a, int32_t b) { return label[a] != label[b] ? label[a] < label[b] : a < b; };
    if (!std::is_sorted(order, order + n, before)) std::sort(order, order + n, before);
    int32_t classes = 0;
    for (int32_t at = 0; at < n; ++at) {
      if (at == 0 || label[order[at]] != label[order[at - 1]]) starts[classes++] = at;
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
void fill_nan(In* gradient, int64_t count) {
  std::fill_n(gradient, count, In(std::numeric_limits<float>::quiet_NaN()));
}

Threads pytorch_threads(int64_t work) {  // in multiplications and additions
  const int64_t count = work < (2 << 20) ? 1 : int64_t(torch::stable::get_num_threads());  // waking threads costs 5 us
  return {count, [](int64_t n, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

template <typename In, typename T>
Kernels<In, T> kernels() {  // for the widest instruction set of this processor
#ifdef TRIPLET_X86
  // ONESHOT_ISA=avx512|avx2|portable takes a narrower set, for tests
  static const char* wanted = std::getenv("ONESHOT_ISA");
  const bool any = wanted == nullptr || *wanted == 0;
  if ((any || !std::strcmp(wanted, "avx512")) && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if constexpr (std::is_same_v<In, torch::headeronly::BFloat16>) {
      if (any && __builtin_cpu_supports("avx512bf16")) return avx512_bf16::kernels();
    }
    return avx512::kernels<In, T>();
  }
  if ((any || std::strcmp(wanted, "portable")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::kernels<In, T>();
  }
#endif
  return portable::kernels<In, T>();
}

// f(In(), T()) for the candidates' type and that of its arithmetic
template <typename F>
void by_type(const Tensor& candidates, F&& f) {
  switch (candidates.scalar_type()) {
    case ScalarType::Double:
      return f(double(), double());
    case ScalarType::Float:
      return f(float(), float());
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16(), float());
    case ScalarType::Half:
      return f(torch::headeronly::Half(), float());
    default:
      require(false, "candidates must be float64, float32, bfloat16 or float16");
  }
}

// The batch's loss into `loss`: (anchors,) for Reduction::none, else one value. The result's fields are the caller's;
// NaN everywhere and a total of -1 if an embedding is not finite.
template <typename In, typename T>
void run_forward(const OwningBatch<In>& batch, const Settings& settings, Result<In, T>& result, T* loss) {
  const Threads threads = pytorch_threads(batch.anchors * batch.candidates * batch.width);
  if (!kernels<In, T>().forward(batch, settings, threads, result)) {
    std::fill_n(result.losses, batch.anchors, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(result.positive, batch.anchors, -1);
    std::fill_n(result.negative, batch.anchors, -1);
    if (result.gradient) fill_nan(result.gradient, result.gradient_rows * batch.width);
    result.total = -1;  // tells the backward pass
  }
  if (settings.reduction == Reduction::none) return;
  double sum = std::accumulate(result.losses, result.losses + batch.anchors, 0.0);
  if (settings.reduction == Reduction::mean && result.total > 0) sum /= double(result.total);
  *loss = T(sum);
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

Tensor matrix(ScalarType type, int64_t rows, int64_t columns) {
  const int64_t sizes[2] = {rows, columns};
  return allocate(type, 2, sizes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor candidates, Tensor labels, int64_t anchors, int64_t,
                                                   int64_t distance, int64_t mining, bool soft_margin, double margin,
                                                   double temperature, int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  const bool each = settings.reduction == Reduction::none;
  Tensor loss, count = scalar(ScalarType::Long), positive, negative;
  by_type(candidates, [&](auto in, auto t) {
    using In = decltype(in);
    using T = decltype(t);
    const OwningBatch<In> batch(candidates, labels, anchors);
    positive = vector(ScalarType::Long, anchors);
    negative = vector(ScalarType::Long, anchors);
    loss = each ? vector(loss_type(candidates), anchors) : scalar(loss_type(candidates));
    T* const reduced = loss.mutable_data_ptr<T>();
    std::unique_ptr<T[]> own(each ? nullptr : new T[anchors]);
    Result<In, T> result{each ? reduced : own.get(), positive.mutable_data_ptr<int64_t>(),
                         negative.mutable_data_ptr<int64_t>()};
    run_forward(batch, settings, result, reduced);
    *count.mutable_data_ptr<int64_t>() = result.total;
  });
  return {loss, count, positive, negative};
}

std::tuple<Tensor, Tensor> loss_and_gradient(Tensor candidates, Tensor labels, int64_t anchors, int64_t gradient_rows,
                                             int64_t distance, int64_t mining, bool soft_margin, double margin,
                                             double temperature, int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  require(settings.reduction != Reduction::none, "a loss that is not reduced has no one gradient");
  Tensor loss, gradient;
  by_type(candidates, [&](auto in, auto t) {
    using In = decltype(in);
    using T = decltype(t);
    const OwningBatch<In> batch(candidates, labels, anchors);
    check_gradient_rows(gradient_rows, anchors, candidates);
    loss = scalar(loss_type(candidates));
    gradient = matrix(candidates.scalar_type(), gradient_rows, batch.width);
    std::unique_ptr<T[]> losses(new T[anchors]);
    std::unique_ptr<int64_t[]> mined(new int64_t[2 * anchors]);
    Result<In, T> result{losses.get(), mined.get(), mined.get() + anchors, 0, gradient.mutable_data_ptr<In>(),
                         gradient_rows};
    run_forward(batch, settings, result, loss.mutable_data_ptr<T>());
  });
  return {loss, gradient};
}

Tensor backward(Tensor grad, Tensor candidates, Tensor labels, Tensor count, Tensor positive, Tensor negative,
                int64_t anchors, int64_t gradient_rows, int64_t distance, int64_t mining, bool soft_margin,
                double margin, double temperature, int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  Tensor gradient;
  by_type(candidates, [&](auto in, auto t) {
    using In = decltype(in);
    using T = decltype(t);
    const OwningBatch<In> batch(candidates, labels, anchors);
    check_gradient_rows(gradient_rows, anchors, candidates);
    check_backward(grad, candidates, count, positive, negative, anchors, settings.reduction);
    gradient = matrix(candidates.scalar_type(), gradient_rows, batch.width);
    In* const out = gradient.mutable_data_ptr<In>();
    const int64_t total = *count.const_data_ptr<int64_t>();
    if (total < 0) return fill_nan(out, gradient_rows * batch.width);
    for (int64_t i = 0; i < anchors; ++i) {
      const int64_t p = positive.const_data_ptr<int64_t>()[i], n = negative.const_data_ptr<int64_t>()[i];
      const bool rows = p >= -1 && n >= -1 && p < batch.candidates && n < batch.candidates && (p < 0) == (n < 0);
      require(rows, "mined rows must be in -1..", batch.candidates - 1, ", -1 in pairs, got ", p, " and ", n);
    }
    const T* given = grad.const_data_ptr<T>();
    std::unique_ptr<T[]> each(new T[anchors]);
    for (int64_t i = 0; i < anchors; ++i) {
      each[i] = settings.reduction == Reduction::none ? given[i * grad.stride(0)] : given[0];
      if (settings.reduction == Reduction::mean) each[i] /= T(std::max<int64_t>(total, 1));
    }
    const int64_t work = (settings.mining == Mining::all ? anchors : 8) * batch.candidates * batch.width;
    kernels<In, T>().backward(batch, settings, pytorch_threads(work), each.get(), positive.const_data_ptr<int64_t>(),
                              negative.const_data_ptr<int64_t>(), out, gradient_rows);
  });
  return gradient;
}

}  // namespace
}  // namespace triplet

STABLE_TORCH_LIBRARY_IMPL(oneshot, CPU, m) {
  m.impl("triplet_forward", TORCH_BOX(&triplet::forward));
  m.impl("triplet_backward", TORCH_BOX(&triplet::backward));
  m.impl("triplet_loss_and_gradient", TORCH_BOX(&triplet::loss_and_gradient));
}
