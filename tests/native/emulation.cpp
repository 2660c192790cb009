// The CUDA kernels on the CPU, by simt.h, for tests/test_emulation.py; and toy kernels with a fault each, which
// the emulation must find. Arrays are NumPy's, C-contiguous, halves as uint16.
#include "simt.h"

#include <set>

#include "cuda/launch.cuh"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace triplet;
using namespace triplet::gpu;

namespace {

// Runs kernels, counts them, and holds them against the list of all.
struct Emulated {
  unsigned seed;
  int launches = 0;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, Arguments... arguments) {
    static const std::set<const void*> known = [] {
      std::set<const void*> found;
      const auto insert = [&](auto kernel) { found.insert(reinterpret_cast<const void*>(kernel)); };
      for_each_kernel<float>(insert);
      for_each_kernel<double>(insert);
      for_each_kernel<Bfloat16>(insert);
      for_each_kernel<Float16>(insert);
      return found;
    }();
    if (!known.count(reinterpret_cast<const void*>(kernel))) throw std::runtime_error("for_each_kernel lacks a kernel");
    simt::launch(seed + unsigned(launches++), kernel, grid, kThreads, Parameters(arguments)...);
  }
};

// Memory that starts as rubbish, between guards that must stay.
template <typename T>
struct Guarded {
  static constexpr int64_t kGuard = 64;
  static constexpr char kRubbish = char(0x7f);  // floats and integers are huge, float16 is NaN
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

// Memory and a workspace in it.
template <typename T>
struct Held {
  Guarded<char> memory;
  Arena arena;
  Workspace<T> work;

  template <typename In>
  Held(const Batch<In>& batch, int slots, int gradient_rows)
      : memory(bytes_of<Workspace<T>>(batch, slots, gradient_rows)),
        arena{memory.data()},
        work(batch, slots, gradient_rows, arena) {}
};

template <typename T>
struct HeldScratch {
  Guarded<char> memory;
  Arena arena;
  Scratch<T> scratch;

  template <typename In>
  HeldScratch(const Batch<In>& batch, const Settings& settings, const Machine& machine, int gradient_rows)
      : memory(bytes_of<Scratch<T>>(batch, settings, machine, gradient_rows)),
        arena{memory.data()},
        scratch(batch, settings, machine, gradient_rows, arena) {}
};

template <typename In>
py::tuple run_forward(const Batch<In>& batch, const Settings& settings, Machine machine, unsigned seed) {
  using T = decltype(widen(In()));
  Emulated launch{seed};
  Guarded<T> losses(batch.anchors), loss(1);
  Guarded<int64_t> count(1), positive(batch.anchors), negative(batch.anchors);
  Held<T> held(batch, slots_of(settings.mining), 0);
  HeldScratch<T> held_scratch(batch, settings, machine, 0);
  forward(launch, machine, batch, settings, held.work, held_scratch.scratch,
          Outputs<T>{losses.data(), loss.data(), count.data(), positive.data(), negative.data()});
  held.memory.check();
  held_scratch.memory.check();
  const py::ssize_t rows = batch.anchors;
  return py::make_tuple(loss.array({1}), losses.array({rows}), count.array({1}), positive.array({rows}),
                        negative.array({rows}));
}

template <typename T, typename In>
py::array run_backward(Emulated& launch, const Batch<In>& batch, const Settings& settings, Machine machine,
                       const Workspace<T>& work, const py::array& grad, const int64_t* count, int gradient_rows) {
  HeldScratch<T> held(batch, settings, machine, gradient_rows);
  Guarded<In> gradient(int64_t(gradient_rows) * batch.width);
  const int64_t stride = settings.reduction == Reduction::none ? grad.strides(0) / int64_t(sizeof(T)) : 0;
  const Upstream<T> up{static_cast<const T*>(grad.data()), stride, count};
  backward(launch, batch, settings, work, held.scratch, up, gradient.data(), gradient_rows);
  held.memory.check();
  using Bits = std::conditional_t<sizeof(In) == 2, uint16_t, In>;
  return gradient.template array<Bits>({gradient_rows, batch.width});
}

int listed_rows(const Settings& settings, int gradient_rows) {
  return settings.mining == Mining::all ? 0 : gradient_rows;
}

// Loss or losses, gradients, kernels launched: with what the forward pass saved.
template <typename In>
py::tuple run_both(const Batch<In>& batch, const Settings& settings, Machine machine, unsigned seed,
                   const py::array& grad, int gradient_rows) {
  using T = decltype(widen(In()));
  Emulated launch{seed};
  Guarded<T> loss(settings.reduction == Reduction::none ? batch.anchors : 1);
  Held<T> held(batch, slots_of(settings.mining), listed_rows(settings, gradient_rows));
  Outputs<T> out{nullptr, nullptr, held.work.count, nullptr, nullptr};
  (settings.reduction == Reduction::none ? out.losses : out.loss) = loss.data();
  HeldScratch<T> held_scratch(batch, settings, machine, 0);
  forward(launch, machine, batch, settings, held.work, held_scratch.scratch, out);
  const auto gradient =
      run_backward<T>(launch, batch, settings, machine, held.work, grad, held.work.count, gradient_rows);
  held.memory.check();
  return py::make_tuple(loss.array({py::ssize_t(loss.count)}), gradient, launch.launches);
}

// Gradients, without that.
template <typename In>
py::array run_backward_alone(const Batch<In>& batch, const Settings& settings, Machine machine, unsigned seed,
                             const py::array& grad, const py::array_t<int64_t>& count,
                             const py::array_t<int64_t>& positive, const py::array_t<int64_t>& negative,
                             int gradient_rows) {
  using T = decltype(widen(In()));
  Emulated launch{seed};
  Held<T> held(batch, 0, listed_rows(settings, gradient_rows));
  recompute(launch, batch, settings, held.work, positive.data(), negative.data());
  const auto gradient = run_backward<T>(launch, batch, settings, machine, held.work, grad, count.data(), gradient_rows);
  held.memory.check();
  return gradient;
}

__global__ void note_mixed(Batch<float> batch, Filters filters, int* mixed) {
  const bool found = may_have_positives<kGroup>(batch, filters, place<kGroup>(batch));
  if (threadIdx.x == 0) mixed[blockIdx.x] = found;
}

// Which tiles of kGroup rows may have positives.
std::vector<int> mixed_tiles(const py::array_t<int64_t>& labels, int anchors) {
  const std::vector<float> x(labels.size());
  const Batch<float> batch{x.data(), labels.data(), anchors, int(labels.size()), 1, false};
  Held<float> held(batch, slots_of(Mining::hard), 0);
  const Workspace<float>& work = held.work;
  Emulated launch{0};
  launch(&prepare_rows<float, float>, dim3(unsigned(batch.groups())), batch, Distance::cosine, work.prepared, Panels{},
         work.zeroed, work.zeroes, true);
  std::vector<int> mixed(tiles_of(batch, kGroup).x);
  simt::launch(1, &note_mixed, tiles_of(batch, kGroup), kThreads, batch, work.prepared.filters, mixed.data());
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
  if (kFault == 5) values.set(t, x);  // beside another's read
  if (kFault >= 7) {
    alignas(16) static const int fresh[4] = {7, 7, 7, 7};
    __syncthreads();
    if (t < kThreads / 4) values.copy_four(4 * t, fresh);
    if (kFault != 7 && kFault != 10) wait_for_copies();     // 7: read before it is there
    if (kFault != 8) __syncthreads();                       // 8: by others before a barrier
    if (kFault == 9 && t == 0) values.copy_four(4, fresh);  // 9, 10: never waited for
    if (kFault != 10) x = values.get(t);
  }
  if (kFault != 6 || t % 2) x = __shfl_xor_sync(kAllLanes, x, 1);  // 6: by half of the lanes
  out[t] = x;
}

py::list run_toy(int fault, unsigned seed) {
  std::vector<int> out(kThreads, -1);
  void (*const kernels[])(int*) = {toy<0>, toy<1>, toy<2>, toy<3>, toy<4>,  toy<5>,
                                   toy<6>, toy<7>, toy<8>, toy<9>, toy<10>, toy<11>};
  simt::launch(seed, kernels[fault], dim3(1), kThreads, out.data());
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
  m.def("both", [](const std::string& type, py::array x, py::array labels, int anchors, bool vectors, Codes codes,
                   int processors, bool tensor_cores, unsigned seed, py::array grad, int gradient_rows) {
    return by_type(type, [&](auto in) {
      const auto batch = make_batch<decltype(in)>(x, labels, anchors, vectors);
      return run_both(batch, settings_of(codes), {processors, tensor_cores}, seed, grad, gradient_rows);
    });
  });
  m.def("backward", [](const std::string& type, py::array x, py::array labels, int anchors, bool vectors, Codes codes,
                       int processors, bool tensor_cores, unsigned seed, py::array grad, int gradient_rows,
                       py::array_t<int64_t> count, py::array_t<int64_t> positive, py::array_t<int64_t> negative) {
    return by_type(type, [&](auto in) {
      const auto batch = make_batch<decltype(in)>(x, labels, anchors, vectors);
      return run_backward_alone(batch, settings_of(codes), {processors, tensor_cores}, seed, grad, count, positive,
                                negative, gradient_rows);
    });
  });
  m.def("mixed_tiles", mixed_tiles);
  m.def("toy", run_toy);
}
