// The CUDA kernels on the CPU, by simt.h, for tests/test_emulation.py; and toy kernels with a fault each, which
// the emulation must find. Arrays are NumPy's, C-contiguous, halves as uint16.
#include "simt.h"

#include "cuda/launch.cuh"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace triplet;
using namespace triplet::gpu;

namespace {

struct Emulated {
  unsigned seed;
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, Arguments... arguments) {
    simt::launch(seed++, kernel, grid, kThreads, Parameters(arguments)...);
  }
};

// Memory that starts as rubbish, between guards that must stay.
template <typename T>
struct Guarded {
  static constexpr int64_t kGuard = 64;
  static constexpr char kRubbish = char(0xa5);
  int64_t count;
  std::vector<T> memory;

  explicit Guarded(int64_t count) : count(count), memory(count + 2 * kGuard) {
    std::memset(static_cast<void*>(memory.data()), kRubbish, memory.size() * sizeof(T));
  }
  T* data() { return memory.data() + kGuard; }
  void check() const {
    const auto clean = [](const T* from) {
      const char* bytes = reinterpret_cast<const char*>(from);
      return std::all_of(bytes, bytes + kGuard * sizeof(T), [](char byte) { return byte == kRubbish; });
    };
    if (!clean(memory.data()) || !clean(memory.data() + kGuard + count)) throw std::runtime_error("written outside");
  }
  template <typename To = T>
  py::array_t<To> array(std::vector<py::ssize_t> shape) {
    static_assert(sizeof(To) == sizeof(T));
    check();
    return py::array_t<To>(shape, reinterpret_cast<To*>(data()));
  }
};

template <typename In>
Batch<In> make_batch(const py::array& x, const py::array& labels, int anchors, bool vectors) {
  return {static_cast<const In*>(x.data()),
          static_cast<const int64_t*>(labels.data()),
          anchors,
          int(x.shape(0)),
          int(x.shape(1)),
          vectors};
}

template <typename In>
py::tuple run_forward(const Batch<In>& batch, const Settings& settings, Machine machine, unsigned seed) {
  using T = decltype(widen(In()));
  Emulated launch{seed};
  Guarded<T> losses(batch.anchors), loss(1);
  Guarded<int64_t> count(1), positive(batch.anchors), negative(batch.anchors);
  Guarded<char> memory(forward_bytes<T>(batch, settings.mining));
  forward<T>(launch, machine, batch, settings, memory.data(),
             Outputs<T>{losses.data(), positive.data(), negative.data(), nullptr}, loss.data(), count.data());
  memory.check();
  const py::ssize_t rows = batch.anchors;
  return py::make_tuple(loss.array({1}), losses.array({rows}), count.array({1}), positive.array({rows}),
                        negative.array({rows}));
}

template <typename In>
py::array run_backward(const Batch<In>& batch, const Settings& settings, unsigned seed, const py::array& grad,
                       const py::array_t<int64_t>& count, const py::array_t<int64_t>& positive,
                       const py::array_t<int64_t>& negative, int gradient_rows) {
  using T = decltype(widen(In()));
  Emulated launch{seed};
  Guarded<char> memory(backward_bytes<T>(batch, settings.mining, gradient_rows));
  Guarded<In> gradient(int64_t(gradient_rows) * batch.width);
  const int64_t stride = settings.reduction == Reduction::none ? grad.strides(0) / int64_t(sizeof(T)) : 0;
  const Upstream<T> up{static_cast<const T*>(grad.data()), stride, count.data(), positive.data(), negative.data()};
  backward<T>(launch, batch, settings, memory.data(), up, gradient.data(), gradient_rows);
  memory.check();
  using Bits = std::conditional_t<sizeof(In) == 2, uint16_t, In>;
  return gradient.template array<Bits>({gradient_rows, batch.width});
}

__global__ void note_mixed(Batch<float> batch, Filters filters, int* mixed) {
  const bool found = may_have_positives<kGroup>(batch, filters, place<kGroup>(batch));
  if (threadIdx.x == 0) mixed[blockIdx.x] = found;
}

// Which tiles of kGroup rows may have positives.
std::vector<int> mixed_tiles(const py::array_t<int64_t>& labels, int anchors) {
  const std::vector<float> x(labels.size());
  const Batch<float> batch{x.data(), labels.data(), anchors, int(labels.size()), 1, false};
  std::vector<char> memory(forward_bytes<float>(batch, Mining::hard));
  Arena arena{memory.data()};
  const Workspace<float> work(batch, slots_of(Mining::hard), arena);
  Emulated launch{0};
  prepare(launch, batch, Distance::cosine, work, true);
  std::vector<int> mixed(tiles_of(batch, kGroup).x);
  launch(&note_mixed, tiles_of(batch, kGroup), batch, work.prepared.filters, mixed.data());
  return mixed;
}

template <typename F>
decltype(std::declval<F>()(double())) by_type(const std::string& type, F&& f) {
  if (type == "float64") return f(double());
  if (type == "float32") return f(float());
  if (type == "bfloat16") return f(Bfloat16());
  if (type == "float16") return f(Float16());
  throw std::invalid_argument("type " + type);
}

// -----------------------------------------------------------------------------------------------------------------
// toys

template <int kFault>
void toy(int* out) {
  __shared__ Shared<int, kThreads> values;
  const int t = int(threadIdx.x);
  if (kFault == 1 && t == 3) return;                        // before a barrier
  if (kFault != 2) values.set(kFault == 3 ? t + 1 : t, t);  // 2: read before written; 3: out of bounds
  if (kFault != 4) __syncthreads();                         // 4: a missing barrier
  int x = values.get(kThreads - 1 - t);
  if (kFault == 5) values.set(t, x);                               // beside another's read
  if (kFault != 6 || t % 2) x = __shfl_xor_sync(kAllLanes, x, 1);  // 6: by half of the lanes
  out[t] = x;
}

py::list run_toy(int fault, unsigned seed) {
  std::vector<int> out(kThreads, -1);
  void (*const kernels[])(int*) = {toy<0>, toy<1>, toy<2>, toy<3>, toy<4>, toy<5>, toy<6>};
  Emulated{seed}(kernels[fault], dim3(1), out.data());
  return py::cast(out);
}

}  // namespace

PYBIND11_MODULE(emulation, m) {
  // codes: distance, mining, soft_margin, margin, temperature, reduction, as the native op's
  using Codes = std::tuple<int64_t, int64_t, bool, double, double, int64_t>;
  static const auto settings_of = [](const Codes& codes) { return std::apply(make_settings, codes); };
  m.def("forward", [](const std::string& type, py::array x, py::array labels, int anchors, bool vectors, Codes codes,
                      int processors, bool tensor_cores, unsigned seed) {
    return by_type(type, [&](auto in) {
      const auto batch = make_batch<decltype(in)>(x, labels, anchors, vectors);
      return run_forward(batch, settings_of(codes), {processors, tensor_cores}, seed);
    });
  });
  m.def("backward", [](const std::string& type, py::array x, py::array labels, int anchors, bool vectors, Codes codes,
                       int gradient_rows, unsigned seed, py::array grad, py::array_t<int64_t> count,
                       py::array_t<int64_t> positive, py::array_t<int64_t> negative) {
    return by_type(type, [&](auto in) {
      const auto batch = make_batch<decltype(in)>(x, labels, anchors, vectors);
      return run_backward(batch, settings_of(codes), seed, grad, count, positive, negative, gradient_rows);
    });
  });
  m.def("mixed_tiles", mixed_tiles);
  m.def("toy", run_toy);
}
