// The native ops on CUDA: tensors to pointers, memory from PyTorch's allocator, launches on PyTorch's current stream.
// What is launched is in triplet_steps.cuh. Nothing waits for the device, so that the ops can be captured in a CUDA
// graph.
#include <cuda_runtime.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "triplet_steps.cuh"

namespace triplet::gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

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

void check_rows(const Tensor& embeddings, const Tensor& labels, const Tensor& beside, const char* name) {
  require(embeddings.dim() == 2 && embeddings.size(0) > 0 && embeddings.size(1) > 0, name,
          " must be (B, D), not empty, got ", embeddings.dim(), " dimensions and ", embeddings.numel(), " values");
  require(labels.dim() == 1 && labels.size(0) == embeddings.size(0), "labels of ", name, " must be (",
          embeddings.size(0), ",), got ", labels.dim(), " dimensions and ", labels.numel(), " values");
  require(labels.scalar_type() == ScalarType::Long, "labels must be int64");
  require(embeddings.is_contiguous() && labels.is_contiguous(), name, " and labels must be contiguous");
  for (const Tensor& tensor : {embeddings, labels}) {
    require(tensor.is_cuda() && tensor.get_device_index() == beside.get_device_index(), name,
            " and labels must be on one GPU");
  }
  require(embeddings.size(1) == beside.size(1) && embeddings.scalar_type() == beside.scalar_type(), name,
          " must have the width and type of embeddings");
}

template <typename T>
const T* values(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename In>
Batch<In> make_batch(const Tensor& embeddings, const Tensor& labels, const MaybeTensor& other_embeddings,
                     const MaybeTensor& other_labels) {
  check_rows(embeddings, labels, embeddings, "embeddings");
  require(other_embeddings.has_value() == other_labels.has_value(), "others need both embeddings and labels");
  if (other_embeddings) check_rows(*other_embeddings, *other_labels, embeddings, "others");
  const int64_t rows = embeddings.size(0), width = embeddings.size(1);
  const int64_t candidates = rows + (other_embeddings ? other_embeddings->size(0) : 0);
  require(candidates < 1 << 30 && width < 1 << 30, "at most 2^30 rows and columns, got ", candidates, " and ", width);
  const In *own = values<In>(embeddings), *others = other_embeddings ? values<In>(*other_embeddings) : nullptr;
  const auto aligned = [](const In* x) { return reinterpret_cast<uintptr_t>(x) % alignof(FourOf<In>) == 0; };
  return {own,
          others,
          values<int64_t>(labels),
          other_labels ? values<int64_t>(*other_labels) : nullptr,
          int(rows),
          int(candidates),
          int(width),
          width % 4 == 0 && aligned(own) && aligned(others)};
}

// f(In()) for the embeddings' type
template <typename F>
void by_type(const Tensor& embeddings, F&& f) {
  switch (embeddings.scalar_type()) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(Bfloat16());
    case ScalarType::Half:
      return f(Float16());
    default:
      require(false, "embeddings must be float64, float32, bfloat16 or float16");
  }
}

Tensor allocate(const Tensor& beside, int64_t count, ScalarType type) {
  return torch::stable::new_empty(beside, {count}, type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_op(Tensor embeddings, Tensor labels, MaybeTensor other_embeddings,
                                                      MaybeTensor other_labels, int64_t distance, int64_t mining,
                                                      bool soft_margin, double margin, double temperature,
                                                      int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  const auto type = embeddings.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Device device(embeddings);
  const Tensor count = torch::stable::new_empty(labels, {});
  Tensor loss, positive, negative;
  by_type(embeddings, [&](auto in) {
    using In = decltype(in);
    using T = decltype(widen(in));
    const auto batch = make_batch<In>(embeddings, labels, other_embeddings, other_labels);
    positive = allocate(labels, batch.rows, ScalarType::Long);
    negative = allocate(labels, batch.rows, ScalarType::Long);
    const Tensor each = allocate(embeddings, batch.rows, type);
    const Tensor memory = allocate(embeddings, forward_bytes<T>(batch), ScalarType::Byte);
    const bool reduced = settings.reduction != Reduction::none;
    loss = reduced ? torch::stable::new_empty(embeddings, {}, type) : each;
    forward<T>(device, device.machine(), batch, settings, pointer<char>(memory),
               Outputs<T>{pointer<T>(each), pointer<int64_t>(positive), pointer<int64_t>(negative), nullptr},
               reduced ? pointer<T>(loss) : nullptr, pointer<int64_t>(count));
  });
  return {loss, count, positive, negative};
}

std::tuple<Tensor, Tensor> backward_op(Tensor grad, Tensor embeddings, Tensor labels, MaybeTensor other_embeddings,
                                       MaybeTensor other_labels, Tensor count, Tensor positive, Tensor negative,
                                       int64_t distance, int64_t mining, bool soft_margin, double margin,
                                       double temperature, int64_t reduction) {
  const Settings settings = make_settings(distance, mining, soft_margin, margin, temperature, reduction);
  Device device(embeddings);
  const Tensor own = torch::stable::empty_like(embeddings);
  const Tensor others =
      other_embeddings ? torch::stable::empty_like(*other_embeddings) : torch::stable::new_empty(embeddings, {0});
  by_type(embeddings, [&](auto in) {
    using In = decltype(in);
    using T = decltype(widen(in));
    const auto batch = make_batch<In>(embeddings, labels, other_embeddings, other_labels);
    const bool each = settings.reduction == Reduction::none;
    require(grad.is_cuda() && grad.scalar_type() == (sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float) &&
                grad.dim() == (each ? 1 : 0),
            "the gradient must have the shape and type of the loss");
    const Tensor memory = allocate(embeddings, backward_bytes<T>(batch, settings.mining), ScalarType::Byte);
    const Upstream<T> up{values<T>(grad), each ? grad.stride(0) : 0, values<int64_t>(count), values<int64_t>(positive),
                         values<int64_t>(negative)};
    backward<T>(device, batch, settings, pointer<char>(memory), up, pointer<In>(own), pointer<In>(others));
  });
  return {own, others};
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
