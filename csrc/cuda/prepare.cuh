// What the search and the cosine need of a batch, in one kernel: scales, shift, squared lengths, label filters, and
// whether all is finite.
#pragma once

#include "cuda/common.cuh"

namespace triplet::gpu {

constexpr int kSampled = 32;  // rows whose mean is the shift and whose largest value sets the scale

// The power of two that brings a value near 1, within the range of T.
template <typename T>
__device__ inline T power_near(T value) {
  constexpr int kMost = sizeof(T) == 4 ? 120 : 1000;
  int exponent = 0;
  if (value > 0) frexp(double(value), &exponent);
  exponent = exponent > kMost ? kMost : exponent < -kMost ? -kMost : exponent;
  return T(ldexp(1.0, -exponent));
}

template <typename T>
struct Sampling {
  Shared<T, kWarps> largest;
  Shared<T, kWarps * kStripWidth> parts;
};

// The scale for the euclidean distances, and their shift into `shift`. Any pair of these serves; every block finds the
// same one, rather than wait for another kernel.
template <typename In, typename T>
__device__ T sample(const Batch<In>& batch, T* shift, Sampling<T>& sampling) {
  constexpr int kOwn = kSampled / kWarps;  // of a warp
  const int warp = int(threadIdx.x) / 32;
  const auto row = [&](int k) { return batch.row(int(int64_t(warp * kOwn + k) * batch.candidates / kSampled)); };
  T largest = 0;
  for (int d = lane(); d < batch.width; d += 32) {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const T size = fabs(T(widen(row(k)[d])));
      largest = size > largest ? size : largest;
    }
  }
  largest = max_of_warp(largest);
  if (lane() == 0) sampling.largest.set(warp, largest);
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    const T other = sampling.largest.get(w);
    largest = other > largest ? other : largest;
  }
  const T scale = power_near(largest);
  const auto add = [&](int begin, T(&sum)[kStrip]) {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
#pragma unroll
      for (int c = 0; c < kStrip; ++c) {
        const int d = begin + c * 32 + lane();
        if (d < batch.width) sum[c] += T(widen(row(k)[d])) * T(1. / kSampled);
      }
    }
  };
  sum_row<T>(batch.width, sampling.parts, add, [&](int d, T mean) { shift[d] = mean * scale; });
  return scale;
}

// Scale and squared length of row j, by an octet of lanes; returns flags. `scale` is the one for euclidean distances.
// Every lane of a warp must call.
template <typename In, typename T>
__device__ int prepare_row(const Batch<In>& batch, Distance distance, const Prepared<T>& prepared, T scale, int j) {
  const bool inside = j < batch.candidates;
  const In* x = batch.row(inside ? j : 0);
  bool finite = true;
  T largest = 0, norm = 0;
  for (int d = lane() % 8; d < batch.width; d += 8) {
    const T value = widen(x[d]), size = fabs(value);
    finite = finite && size - size == 0;
    largest = size > largest ? size : largest;
    if (distance == Distance::cosine) continue;
    const T seen = fma(value, scale, -prepared.shift[d]);
    norm = fma(seen, seen, norm);
  }
  norm = sum_of_octet(norm);
  if (distance == Distance::cosine) {
#pragma unroll
    for (int lanes = 4; lanes; lanes /= 2) {
      const T other = __shfl_xor_sync(kAllLanes, largest, lanes);
      largest = other > largest ? other : largest;
    }
    const double unit = power_near(double(largest));
    double squares = 0;  // of x * unit, which cannot overflow
    for (int d = lane() % 8; d < batch.width; d += 8) {
      const double value = double(widen(x[d])) * unit;
      squares = fma(value, value, squares);
    }
    const double length = sqrt(sum_of_octet(squares)) / unit;
    scale = largest > 0 ? T(1 / (length < 1e-12 ? 1e-12 : length)) : T(0);  // 0: no gradient either
    norm = 1;
  }
  if (!inside) return 0;
  if (lane() % 8 == 0) {
    prepared.scale[j] = scale;
    prepared.norms[j] = norm;
  }
  return !finite ? kNotFinite : norm <= T(1e30) ? 0 : kTooLong;
}

// A thread's word of the label filter of rows [begin, end).
template <typename In>
__device__ uint32_t filter_word(const Batch<In>& batch, int begin, int end, Shared<int, kGroup>& hashes) {
  const int t = int(threadIdx.x);
  if (t < end - begin) hashes.set(t, int(uint64_t(batch.labels[begin + t]) * 0x9e3779b97f4a7c15u >> 51));  // 13 bits
  __syncthreads();
  uint32_t word = 0;
  for (int i = 0; i < end - begin; ++i) word |= hashes.get(i) / 32 == t ? 1u << hashes.get(i) % 32 : 0u;
  return word;
}

// One block a group of rows. All blocks clear `zeroes` keys from `zeroed` on, and unless `measured` that is all they
// do.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads)
    prepare_rows(Batch<In> batch, Distance distance, Prepared<T> prepared, Key* zeroed, int64_t zeroes, bool measured) {
  __shared__ Shared<int, kGroup> hashes;
  __shared__ Sampling<T> sampling;
  const int t = int(threadIdx.x), group = int(blockIdx.x), own = batch.own_groups();
  for (int64_t i = int64_t(group) * kThreads + t; i < zeroes; i += int64_t(gridDim.x) * kThreads) zeroed[i] = 0;
  if (!measured) return;
  const bool cosine = distance == Distance::cosine;
  const int begin = group < own ? group * kGroup : batch.anchors + (group - own) * kGroup;
  const int last = group < own ? batch.anchors : batch.candidates, end = begin + kGroup < last ? begin + kGroup : last;
  for (int d = (cosine ? 0 : batch.width) + t; group == 0 && d < (batch.width + 3) / 4 * 4; d += kThreads) {
    prepared.shift[d] = 0;
  }
  if (prepared.filters.words) {
    prepared.filters.words[int64_t(group) * kThreads + t] = filter_word(batch, begin, end, hashes);
  }
  const T scale = cosine ? T(0) : sample(batch, prepared.shift, sampling);
  int flags = 0;
  for (int j = begin + t / 8; j - t / 8 < end; j += kThreads / 8) {
    flags |= prepare_row(batch, distance, prepared, scale, j < end ? j : batch.candidates);
  }
  const int too_long = __syncthreads_or(flags & kTooLong), not_finite = __syncthreads_or(flags & kNotFinite);
  if (t == 0) prepared.flags[group] = not_finite ? kNotFinite : too_long ? kTooLong : 0;
}

}  // namespace triplet::gpu
