// The native ops on CUDA: tensors to pointers, memory from PyTorch's allocator, launches on PyTorch's current stream.
// What is launched is in launch.cuh. Nothing waits for the device, so that the ops can be captured in a CUDA
// graph.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <tuple>

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

 public:
  int index;

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
    kernel<<<grid, kThreads, 0, stream>>>(Parameters(arguments)...);
    check(cudaGetLastError());
  }

  Machine machine() const {
    int processors, major;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    return {processors, major >= 8};
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

Tensor allocate(const Tensor& beside, int64_t count, ScalarType type) {
  return torch::stable::new_empty(beside, {count}, type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_op(Tensor candidates, Tensor labels, int64_t anchors, int64_t,
                                                      int64_t distance, int64_t mining, bool soft_margin, double margin,
                                                      double temperature, int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  Device device(candidates);
  const Tensor count = torch::stable::new_empty(labels, {});
  Tensor loss, positive, negative;
  by_type(candidates, [&](auto in) {
    using In = decltype(in);
    using T = decltype(widen(in));
    const auto batch = make_batch<In>(candidates, labels, anchors);
    positive = allocate(labels, anchors, ScalarType::Long);
    negative = allocate(labels, anchors, ScalarType::Long);
    const Tensor each = allocate(candidates, anchors, loss_type(candidates));
    const Tensor memory = allocate(candidates, forward_bytes<T>(batch, settings.mining), ScalarType::Byte);
    const bool reduced = settings.reduction != Reduction::none;
    loss = reduced ? torch::stable::new_empty(candidates, {}, loss_type(candidates)) : each;
    forward<T>(device, device.machine(), batch, settings, pointer<char>(memory),
               Outputs<T>{pointer<T>(each), pointer<int64_t>(positive), pointer<int64_t>(negative), nullptr},
               reduced ? pointer<T>(loss) : nullptr, pointer<int64_t>(count));
  });
  return {loss, count, positive, negative};
}

Tensor backward_op(Tensor grad, Tensor candidates, Tensor labels, Tensor count, Tensor positive, Tensor negative,
                   int64_t anchors, int64_t gradient_rows, int64_t distance, int64_t mining, bool soft_margin,
                   double margin, double temperature, int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  Device device(candidates);
  Tensor gradient;
  by_type(candidates, [&](auto in) {
    using In = decltype(in);
    using T = decltype(widen(in));
    const auto batch = make_batch<In>(candidates, labels, anchors);
    check_gradient_rows(gradient_rows, anchors, candidates);
    check_backward(grad, candidates, count, positive, negative, anchors, settings.reduction);
    gradient = torch::stable::new_empty(candidates, {gradient_rows, candidates.size(1)});
    const int rows = int(gradient_rows);
    const Tensor memory = allocate(candidates, backward_bytes<T>(batch, settings.mining, rows), ScalarType::Byte);
    const Upstream<T> up{values<T>(grad), settings.reduction == Reduction::none ? grad.stride(0) : 0,
                         values<int64_t>(count), values<int64_t>(positive), values<int64_t>(negative)};
    backward<T>(device, batch, settings, pointer<char>(memory), up, pointer<In>(gradient), rows);
  });
  return gradient;
}

// Whether the kernels were compiled for the current GPU.
bool cuda_runs() {
  cudaFuncAttributes attributes;
  const bool runs = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&clear)) == cudaSuccess;
  cudaGetLastError();  // an error would stay for the next check
  return runs;
}

}  // namespace
}  // namespace triplet::gpu

STABLE_TORCH_LIBRARY_FRAGMENT(oneshot, m) { m.def("cuda_runs() -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(oneshot, CompositeExplicitAutograd, m) {
  m.impl("cuda_runs", TORCH_BOX(&triplet::gpu::cuda_runs));
}

STABLE_TORCH_LIBRARY_IMPL(oneshot, CUDA, m) {
  m.impl("triplet_forward", TORCH_BOX(&triplet::gpu::forward_op));
  m.impl("triplet_backward", TORCH_BOX(&triplet::gpu::backward_op));
}
