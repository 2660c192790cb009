// The native ops on CUDA: tensors to pointers, memory from PyTorch's allocator, launches on PyTorch's current stream.
// What is launched is in launch.cuh. Nothing waits for the device, so that the ops can be captured in a CUDA
// graph.
#include <cuda_runtime.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cuda/launch.cuh"

namespace triplet::gpu {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("triplet loss: ") + cudaGetErrorString(error));
}

// The device of the tensors and PyTorch's current stream on it; launches kernels there.
class Device {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  int index;

 public:
  explicit Device(const Tensor& tensor) : guard(tensor.get_device_index()), index(tensor.get_device_index()) {
    check(cudaSetDevice(index));  // this library has a CUDA runtime of its own
    void* current = nullptr;
    if (aoti_torch_get_current_cuda_stream(index, &current) != AOTI_TORCH_SUCCESS) {
      throw std::runtime_error("triplet loss: PyTorch gives no CUDA stream");
    }
    stream = static_cast<cudaStream_t>(current);
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, Arguments... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  }

  const Machine& machine() const {
    static const std::vector<Machine> machines = [] {
      int count;
      check(cudaGetDeviceCount(&count));
      std::vector<Machine> found(count);
      for (int device = 0; device < count; ++device) {
        int major;
        check(cudaDeviceGetAttribute(&found[device].processors, cudaDevAttrMultiProcessorCount, device));
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
        found[device].tensor_cores = major >= 8;
      }
      return found;
    }();
    return machines.at(index);
  }
};

template <typename T>
const T* values(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename In>
Batch<In> make_batch(const Tensor& candidates, const Tensor& labels, int64_t anchors) {
  check_batch(candidates, labels, anchors);
  require(candidates.is_cuda(), "candidates must be on a GPU");
  const In* x = values<In>(candidates);
  const int64_t width = candidates.size(1);
  const bool aligned = reinterpret_cast<uintptr_t>(x) % alignof(FourOf<In>) == 0;
  return {x, values<int64_t>(labels), int(anchors), int(candidates.size(0)), int(width), width % 4 == 0 && aligned};
}

// f(In()) for the candidates' type
template <typename F>
void by_type(const Tensor& candidates, F&& f) {
  switch (candidates.scalar_type()) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(Bfloat16());
    case ScalarType::Half:
      return f(Float16());
    default:
      require(false, "candidates must be float64, float32, bfloat16 or float16");
  }
}

// A tensor straight from its allocator, as torch::stable::new_empty looks up its operator by name each time. At most
// two dimensions.
Tensor allocate(const Tensor& beside, ScalarType type, std::initializer_list<int64_t> sizes) {
  const int64_t strides[] = {sizes.size() == 2 ? sizes.begin()[1] : 1, 1};
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides,
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                               aoti_torch_device_type_cuda(), beside.get_device_index(), &made));
  return Tensor(made);
}

// A workspace and the memory it lies in.
template <typename T, typename In>
Workspace<T> place_workspace(const Tensor& memory, const Batch<In>& batch, int slots, int gradient_rows) {
  Arena arena{pointer<char>(memory)};
  return Workspace<T>(batch, slots, gradient_rows, arena);
}

// Memory for a pass while it runs, and what lies in it.
template <typename T>
struct Held {
  Tensor memory;
  Arena arena{nullptr};
  Scratch<T> scratch;

  template <typename In>
  Held(const Device& device, const Tensor& candidates, const Batch<In>& batch, const Settings& settings,
       int gradient_rows)
      : scratch(batch, settings, device.machine(), gradient_rows, arena) {
    if (arena.used == 0) return;
    memory = allocate(candidates, ScalarType::Byte, {arena.used});
    arena = {pointer<char>(memory)};
    scratch = Scratch<T>(batch, settings, device.machine(), gradient_rows, arena);
  }
};

template <typename T, typename In>
void run_forward(const Device& device, const Tensor& candidates, const Batch<In>& batch, const Settings& settings,
                 Workspace<T>& work, const Outputs<T>& out) {
  const Held<T> held(device, candidates, batch, settings, 0);
  forward(device, device.machine(), batch, settings, work, held.scratch, out);
}

int listed_rows(Mining mining, int64_t gradient_rows) { return mining == Mining::all ? 0 : int(gradient_rows); }

// The loss, () or (anchors,), and where to write it.
template <typename T>
Tensor allocate_loss(const Tensor& candidates, int64_t anchors, const Settings& settings, Outputs<T>& out) {
  const bool each = settings.reduction == Reduction::none;
  const Tensor loss =
      each ? allocate(candidates, loss_type(candidates), {anchors}) : allocate(candidates, loss_type(candidates), {});
  (each ? out.losses : out.loss) = pointer<T>(loss);
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_op(Tensor candidates, Tensor labels, int64_t anchors, int64_t,
                                                      int64_t distance, int64_t mining, bool soft_margin, double margin,
                                                      double temperature, int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  const Device device(candidates);
  Tensor loss, count, positive, negative;
  by_type(candidates, [&](auto in) {
    using T = decltype(widen(in));
    const auto batch = make_batch<decltype(in)>(candidates, labels, anchors);
    const int slots = slots_of(settings.mining);
    const Tensor memory = allocate(candidates, ScalarType::Byte, {bytes_of<Workspace<T>>(batch, slots, 0)});
    count = allocate(labels, ScalarType::Long, {});
    positive = allocate(labels, ScalarType::Long, {anchors});
    negative = allocate(labels, ScalarType::Long, {anchors});
    Outputs<T> out{nullptr, nullptr, pointer<int64_t>(count), pointer<int64_t>(positive), pointer<int64_t>(negative)};
    loss = allocate_loss(candidates, anchors, settings, out);
    auto work = place_workspace<T>(memory, batch, slots, 0);
    run_forward(device, candidates, batch, settings, work, out);
  });
  return {loss, count, positive, negative};
}

// As `forward_op`, with what the gradients need in one tensor.
std::tuple<Tensor, Tensor> forward_saving_op(Tensor candidates, Tensor labels, int64_t anchors, int64_t gradient_rows,
                                             int64_t distance, int64_t mining, bool soft_margin, double margin,
                                             double temperature, int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  const Device device(candidates);
  Tensor loss, saved;
  by_type(candidates, [&](auto in) {
    using T = decltype(widen(in));
    const auto batch = make_batch<decltype(in)>(candidates, labels, anchors);
    check_gradient_rows(gradient_rows, anchors, candidates);
    const int slots = slots_of(settings.mining), rows = listed_rows(settings.mining, gradient_rows);
    saved = allocate(candidates, ScalarType::Byte, {bytes_of<Workspace<T>>(batch, slots, rows)});
    auto work = place_workspace<T>(saved, batch, slots, rows);
    Outputs<T> out{nullptr, nullptr, work.count, nullptr, nullptr};
    loss = allocate_loss(candidates, anchors, settings, out);
    run_forward(device, candidates, batch, settings, work, out);
  });
  return {loss, saved};
}

template <typename T, typename In>
Tensor run_backward(const Device& device, const Batch<In>& batch, const Settings& settings, const Workspace<T>& work,
                    const Tensor& grad, const int64_t* count, const Tensor& candidates, int64_t gradient_rows) {
  const Tensor gradient = allocate(candidates, candidates.scalar_type(), {gradient_rows, batch.width});
  const int rows = int(gradient_rows);
  const Upstream<T> up{values<T>(grad), settings.reduction == Reduction::none ? grad.stride(0) : 0, count};
  const Held<T> held(device, candidates, batch, settings, rows);
  backward(device, batch, settings, work, held.scratch, up, pointer<In>(gradient), rows);
  return gradient;
}

Tensor backward_op(Tensor grad, Tensor candidates, Tensor labels, Tensor count, Tensor positive, Tensor negative,
                   int64_t anchors, int64_t gradient_rows, int64_t distance, int64_t mining, bool soft_margin,
                   double margin, double temperature, int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  const Device device(candidates);
  Tensor gradient;
  by_type(candidates, [&](auto in) {
    using T = decltype(widen(in));
    const auto batch = make_batch<decltype(in)>(candidates, labels, anchors);
    check_gradient_rows(gradient_rows, anchors, candidates);
    check_backward(grad, candidates, count, positive, negative, anchors, settings.reduction);
    const int rows = listed_rows(settings.mining, gradient_rows);
    const Tensor memory = allocate(candidates, ScalarType::Byte, {bytes_of<Workspace<T>>(batch, 0, rows)});
    const auto work = place_workspace<T>(memory, batch, 0, rows);
    recompute(device, batch, settings, work, values<int64_t>(positive), values<int64_t>(negative));
    gradient = run_backward<T>(device, batch, settings, work, grad, values<int64_t>(count), candidates, gradient_rows);
  });
  return gradient;
}

Tensor backward_saved_op(Tensor grad, Tensor candidates, Tensor labels, Tensor saved, int64_t anchors,
                         int64_t gradient_rows, int64_t distance, int64_t mining, bool soft_margin, double margin,
                         double temperature, int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  const Device device(candidates);
  Tensor gradient;
  by_type(candidates, [&](auto in) {
    using T = decltype(widen(in));
    const auto batch = make_batch<decltype(in)>(candidates, labels, anchors);
    check_gradient_rows(gradient_rows, anchors, candidates);
    check_gradient_of_loss(grad, candidates, anchors, settings.reduction);
    const int slots = slots_of(settings.mining), rows = listed_rows(settings.mining, gradient_rows);
    check_beside("saved", saved, candidates);
    require(saved.scalar_type() == ScalarType::Byte && saved.numel() == bytes_of<Workspace<T>>(batch, slots, rows),
            "saved must be what the forward pass of this batch saved");
    const auto work = place_workspace<T>(saved, batch, slots, rows);
    gradient = run_backward<T>(device, batch, settings, work, grad, work.count, candidates, gradient_rows);
  });
  return gradient;
}

// Whether the kernels were compiled for a GPU. Loads them, as none can be loaded while a CUDA graph is captured.
bool cuda_runs(int64_t device) {
  int count = 0;
  bool runs = cudaGetDeviceCount(&count) == cudaSuccess && device < count;
  if (runs) {
    const torch::stable::accelerator::DeviceGuard guard{int32_t(device)};
    runs = cudaSetDevice(int(device)) == cudaSuccess;
    const auto load = [&](auto kernel) {
      cudaFuncAttributes attributes;
      runs = runs && cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess;
    };
    for_each_kernel<float>(load);
    for_each_kernel<double>(load);
    for_each_kernel<Bfloat16>(load);
    for_each_kernel<Float16>(load);
  }
  cudaGetLastError();  // an error would stay for the next check
  return runs;
}

}  // namespace
}  // namespace triplet::gpu

STABLE_TORCH_LIBRARY_FRAGMENT(oneshot, m) {
  m.def("cuda_runs(int device) -> bool");
  // For eager training, `saved` is all that the backward pass needs beside the batch: nothing is computed twice.
  m.def("triplet_forward_saving(" TRIPLET_BATCH TRIPLET_OPTIONS "(Tensor loss, Tensor saved)");
  m.def("triplet_backward_saved(Tensor grad, " TRIPLET_BATCH "Tensor saved, " TRIPLET_OPTIONS "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(oneshot, CompositeExplicitAutograd, m) {
  m.impl("cuda_runs", TORCH_BOX(&triplet::gpu::cuda_runs));
}

STABLE_TORCH_LIBRARY_IMPL(oneshot, CUDA, m) {
  m.impl("triplet_forward", TORCH_BOX(&triplet::gpu::forward_op));
  m.impl("triplet_backward", TORCH_BOX(&triplet::gpu::backward_op));
  m.impl("triplet_forward_saving", TORCH_BOX(&triplet::gpu::forward_saving_op));
  m.impl("triplet_backward_saved", TORCH_BOX(&triplet::gpu::backward_saved_op));
}
