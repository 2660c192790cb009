// The CPU kernels for vectors of 64 bytes, for tests/test_wide.py: without a target pragma the compiler makes do with
// the instructions that this machine has. Arrays are NumPy's, C-contiguous, halves as uint16; the functions are called
// as those of emulation.cpp are.
#include <algorithm>
#include <numeric>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/kernels.h"

namespace triplet::wide {
constexpr int kBytes = 64, kRows = 12;
constexpr bool kBfloat16Dots = true;

// what an instruction of AVX512_BF16 does: a bfloat16 is the upper half of a float
template <typename Sums, typename Pairs>
inline Sums dot_pairs(Sums sum, Pairs a, Pairs b) {
  constexpr int kUpper = ~0xffff;
  sum += (Sums)(a & kUpper) * (Sums)(b & kUpper);
  return sum + (Sums)(a << 16) * (Sums)(b << 16);
}

#include "cpu/kernels.inc"
}  // namespace triplet::wide

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace triplet;

namespace {

template <typename In>
struct OwningBatch : Batch<In> {
  std::vector<int32_t> class_numbers, order_of_rows, starts_of_classes;

  OwningBatch(const py::array& x, const py::array& labels, int64_t anchors) {
    const int64_t n = x.shape(0);
    const auto* const label = static_cast<const int64_t*>(labels.data());
    class_numbers.resize(n), order_of_rows.resize(n);
    std::iota(order_of_rows.begin(), order_of_rows.end(), 0);
    std::stable_sort(order_of_rows.begin(), order_of_rows.end(), [&](int a, int b) { return label[a] < label[b]; });
    for (int32_t at = 0; at < n; ++at) {
      if (!at || label[order_of_rows[at]] != label[order_of_rows[at - 1]]) starts_of_classes.push_back(at);
      class_numbers[order_of_rows[at]] = int32_t(starts_of_classes.size()) - 1;
    }
    starts_of_classes.push_back(int32_t(n));
    static_cast<Batch<In>&>(*this) = {static_cast<const In*>(x.data()),
                                      anchors,
                                      n,
                                      x.shape(1),
                                      class_numbers.data(),
                                      order_of_rows.data(),
                                      starts_of_classes.data(),
                                      int64_t(starts_of_classes.size()) - 1};
  }
};

// As many as three threads would have, one after another and the last one first.
const Threads threads = {3, [](int64_t n, void (*body)(void*, int64_t), void* context) {
                           while (n > 0) body(context, --n);
                         }};

template <typename In>
using Arithmetic = std::conditional_t<sizeof(In) == 8, double, float>;

// Uninitialised memory between guards that must stay.
template <typename T>
struct Guarded {
  static constexpr int64_t kGuard = 64;
  std::vector<unsigned char> memory;

  explicit Guarded(int64_t count) : memory(count * sizeof(T) + 2 * kGuard, 0xa5) {}
  T* data() { return reinterpret_cast<T*>(memory.data() + kGuard); }
  template <typename To = T>
  py::array array(std::vector<py::ssize_t> shape) {
    const auto clean = [](auto from) {
      return std::all_of(from, from + kGuard, [](auto byte) { return byte == 0xa5; });
    };
    if (!clean(memory.begin()) || !clean(memory.end() - kGuard)) throw std::runtime_error("written outside");
    return py::array_t<To>(shape, reinterpret_cast<To*>(data()));
  }
};

template <typename In>
using Bits = std::conditional_t<sizeof(In) == 2, uint16_t, In>;

template <typename In>
py::tuple run_forward(const Batch<In>& batch, const Settings& settings) {
  using T = Arithmetic<In>;
  Guarded<T> losses(batch.anchors);
  Guarded<int64_t> positive(batch.anchors), negative(batch.anchors);
  Result<In, T> result{losses.data(), positive.data(), negative.data()};
  if (!wide::forward(batch, settings, threads, result)) throw std::runtime_error("not finite");
  const std::vector<py::ssize_t> rows = {batch.anchors};
  double sum = std::accumulate(losses.data(), losses.data() + batch.anchors, 0.0);
  if (settings.reduction == Reduction::mean) sum /= double(std::max<int64_t>(result.total, 1));
  return py::make_tuple(std::vector<double>{sum}, losses.array(rows), std::vector<int64_t>{result.total},
                        positive.array(rows), negative.array(rows));
}

// Gradients by the backward pass; where the loss is reduced, by the forward pass, times the one upstream gradient.
template <typename In>
py::array run_backward(const Batch<In>& batch, const Settings& settings, const py::array& grad,
                       const py::array_t<int64_t>& positive, const py::array_t<int64_t>& negative,
                       int64_t gradient_rows) {
  using T = Arithmetic<In>;
  Guarded<In> gradient(gradient_rows * batch.width);
  const auto kernels = wide::kernels<In, T>();
  if (settings.reduction == Reduction::none) {
    kernels.backward(batch, settings, threads, static_cast<const T*>(grad.data()), positive.data(), negative.data(),
                     gradient.data(), gradient_rows);
  } else {
    Guarded<T> losses(batch.anchors);
    Guarded<int64_t> mined(2 * batch.anchors);
    Result<In, T> result{losses.data(), mined.data(), mined.data() + batch.anchors, 0, gradient.data(), gradient_rows};
    kernels.forward(batch, settings, threads, result);
  }
  return gradient.template array<Bits<In>>({gradient_rows, batch.width});
}

template <typename F>
decltype(std::declval<F>()(double())) by_type(const std::string& type, F&& f) {
  if (type == "float64") return f(double());
  if (type == "float32") return f(float());
  if (type == "bfloat16") return f(torch::headeronly::BFloat16());
  if (type == "float16") return f(torch::headeronly::Half());
  throw std::invalid_argument("type " + type);
}

}  // namespace

PYBIND11_MODULE(wide, m) {
  // codes: distance, mining, soft_margin, margin, temperature, reduction, as the native op's
  using Codes = std::tuple<int64_t, int64_t, bool, double, double, int64_t>;
  static const auto settings_of = [](const Codes& codes) { return std::apply(make_settings, codes); };
  m.def("forward", [](const std::string& type, py::array x, py::array labels, int anchors, bool, Codes codes, int, bool,
                      unsigned) {
    return by_type(
        type, [&](auto in) { return run_forward(OwningBatch<decltype(in)>(x, labels, anchors), settings_of(codes)); });
  });
  m.def("backward", [](const std::string& type, py::array x, py::array labels, int anchors, bool, Codes codes, int,
                       bool, unsigned, py::array grad, int gradient_rows, py::object, py::array_t<int64_t> positive,
                       py::array_t<int64_t> negative) {
    return by_type(type, [&](auto in) {
      const OwningBatch<decltype(in)> batch(x, labels, anchors);
      return run_backward(batch, settings_of(codes), grad, positive, negative, gradient_rows);
    });
  });
}
