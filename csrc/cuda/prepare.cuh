// What the search and the cosine need of a batch: scales, column means, squared lengths, label filters, and whether all
// is finite.
#pragma once

#include "cuda/common.cuh"

namespace triplet::gpu {

// A kernel of its own, since a memset would not run in the emulation.
__global__ static void __launch_bounds__(kThreads) clear(Key* keys, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) keys[i] = 0;
}

// Largest |x| of all rows, whether all are finite, label filters, and for cosine 1 / |x| of each. One warp a row. For
// halves a processor holds 4 blocks at least: without that bound ptxas spills.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(In) == 2 ? 4 : 0)
    measure(Batch<In> batch, Distance distance, Prepared<T> prepared) {
  const int j = warp_row();
  if (j >= batch.candidates) return;
  if (prepared.filters.words && lane() == 0) {
    const uint32_t hash = uint32_t(uint64_t(batch.labels[j]) * 0x9e3779b97f4a7c15u >> 51);  // 13 bits
    atomicOr(prepared.filters.of(batch, j) + hash / 32, 1u << hash % 32);
  }
  const In* x = batch.row(j);
  double largest = 0;
  int unsound = 0;
  for (int d = lane(); d < batch.width; d += 32) {
    const double size = fabs(double(widen(x[d])));
    unsound |= !(size <= 1.7976931348623157e308);  // the largest double
    largest = size > largest ? size : largest;
  }
  if (__ballot_sync(kAllLanes, unsound)) {
    if (lane() == 0) {
      atomicMax(prepared.unsound, 1ull);
      prepared.scale[j] = 0;
      prepared.norms[j] = 0;
    }
    return;
  }
  largest = max_of_warp(largest);
  if (distance != Distance::cosine) {
    if (lane() == 0) atomicMax(prepared.extreme, bits_as<Key>(largest));
    return;
  }
  double squares = 0;  // of x / largest, which cannot overflow
  for (int d = lane(); d < batch.width; d += 32) {
    const double part = largest > 0 ? double(widen(x[d])) / largest : 0;
    squares += part * part;
  }
  const double norm = largest * sqrt(sum_of_warp(squares));
  if (lane() == 0) {
    prepared.scale[j] = largest > 0 ? T(1 / (norm < 1e-12 ? 1e-12 : norm)) : T(0);  // 0: no gradient either
    prepared.norms[j] = 1;
  }
}

// The power of two that brings the largest |x| near 1, within the range of T.
template <typename T>
__device__ inline T common_scale(const Key* extreme) {
  constexpr int kMost = sizeof(T) == 4 ? 120 : 1000;
  const double largest = bits_as<double>(*extreme);
  int exponent = 0;
  if (largest > 0) frexp(largest, &exponent);
  exponent = exponent > kMost ? kMost : exponent < -kMost ? -kMost : exponent;
  return T(ldexp(1.0, -exponent));
}

// Sums of a stripe of rows, column by column: (gridDim.y, width). A block has 32 columns and 8 rows at a time.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads) column_sums(Batch<In> batch, Prepared<T> prepared, double* sums) {
  __shared__ Shared<double, kThreads> parts;
  const int d = int(blockIdx.x) * 32 + lane(), strand = int(threadIdx.x / 32);
  const T scale = common_scale<T>(prepared.extreme);
  double sum = 0;
  if (d < batch.width) {
    for (int j = int(blockIdx.y) * kWarps + strand; j < batch.candidates; j += int(gridDim.y) * kWarps) {
      sum += double(T(widen(batch.row(j)[d])) * scale);
    }
  }
  parts.set(int(threadIdx.x), sum);
  __syncthreads();
  if (strand == 0 && d < batch.width) {
    for (int other = 1; other < kWarps; ++other) sum += parts.get(other * 32 + lane());
    sums[int64_t(blockIdx.y) * batch.width + d] = sum;
  }
}

template <typename T>
__global__ void column_means(const double* sums, int stripes, int candidates, int width, T* shift) {
  const int d = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (d >= width) return;
  double sum = 0;
  for (int stripe = 0; stripe < stripes; ++stripe) sum += sums[int64_t(stripe) * width + d];
  shift[d] = T(sum / candidates);
}

// Scale and squared length of each row for the euclidean distances. One warp a row.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads) centred_norms(Batch<In> batch, Prepared<T> prepared) {
  const int j = warp_row();
  if (j >= batch.candidates) return;
  const In* x = batch.row(j);
  const T scale = common_scale<T>(prepared.extreme);
  T squares = 0;
  for (int d = lane(); d < batch.width; d += 32) {
    const T value = fma(T(widen(x[d])), scale, -prepared.shift[d]);
    squares = fma(value, value, squares);
  }
  squares = sum_of_warp(squares);
  if (lane() == 0) {
    prepared.scale[j] = scale;
    prepared.norms[j] = squares;
  }
}

}  // namespace triplet::gpu
