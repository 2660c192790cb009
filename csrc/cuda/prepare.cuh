// What the search and the cosine need of a batch, in one kernel: scales, shift, squared lengths, rows for tensor cores,
// label filters, and whether all is finite.
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

template <typename T>
struct Row {
  T scale, norm;
  int flags;
};

// Scale and squared length of row j, by an octet of lanes. `scale` is the one for euclidean distances. Every lane of a
// warp must call.
template <typename In, typename T>
__device__ Row<T> measure_row(const Batch<In>& batch, Distance distance, const T* shift, T scale, int j) {
  const bool inside = j < batch.candidates;
  const In* x = batch.row(inside ? j : 0);
  bool finite = true;
  T largest = 0, norm = 0;
  for (int d = lane() % 8; d < batch.width; d += 8) {
    const T value = widen(x[d]), size = fabs(value);
    finite = finite && size - size == 0;
    largest = size > largest ? size : largest;
    if (distance == Distance::cosine) continue;
    const T seen = fma(value, scale, -shift[d]);
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
  return {scale, norm, !inside ? 0 : !finite ? kNotFinite : norm <= T(1e30) ? 0 : kTooLong};
}

// A bfloat16 row can be so long or short that products of its values leave float32: a power of two near 1 / |x| brings
// it near 1, exactly. 1 for float16.
template <typename In>
__device__ inline float power_of_two(float scale) {
  if constexpr (std::is_same_v<In, Float16>) return scale > 0;
  const float power = bits_as<float>(bits_as<uint32_t>(scale) & 0x7f800000u);
  return power > 0 || scale == 0 ? power : 1.17549435e-38f;  // the smallest that is not denormal
}

// Row j for tensor cores, by an octet of lanes; zeros where it is beyond the end of the anchors or of the others.
template <typename In>
__device__ void write_panels(const Batch<In>& batch, const float* shift, const Row<float>& row, const Panels& panels,
                             int j, bool of_anchors, bool inside) {
  const int r = of_anchors ? j : j - batch.anchors, block = (of_anchors ? 0 : panels.own) + r / 16;
  const bool split = panels.numbers == Numbers::split;
  // of a split row the length is near 2^12: what is left of its values is a half with all its digits
  const float power = split ? power_near(sqrt(row.norm)) * 4096 : power_of_two<In>(row.scale);
  if (inside && lane() % 8 == 0) panels.rests[j] = split ? 1 / power : power > 0 ? row.scale / power : 0.f;
  for (int pair = lane() % 8; pair < 8 * panels.steps; pair += 8) {
    const int64_t to = panels.at(block, pair / 8) + (r % 8 * 4 + pair % 4) * 4 + r / 8 % 2 + pair % 8 / 4 * 2;
    uint32_t high = 0, low = 0;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int d = 2 * pair + c;
      if (!inside || d >= batch.width) continue;
      const In x = batch.row(j)[d];
      uint16_t bits = 0, rest = 0;
      if (split) {
        const float value = fma(float(widen(x)), row.scale, shift ? -shift[d] : 0.f) * power;
        bits = float_to_half(value);
        rest = float_to_half(value - half_to_float(bits));
      } else if constexpr (std::is_same_v<In, Bfloat16>) {
        bits = uint16_t(bits_as<uint32_t>(widen(x) * power) >> 16);
      } else if constexpr (std::is_same_v<In, Float16>) {
        bits = power > 0 ? x.bits : uint16_t(0);
      }
      high |= uint32_t(bits) << 16 * c;
      low |= uint32_t(rest) << 16 * c;
    }
    panels.high[to] = high;
    if (split) panels.low[to] = low;
  }
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
__global__ void __launch_bounds__(kThreads) prepare_rows(Batch<In> batch, Distance distance, Prepared<T> prepared,
                                                         Panels panels, Key* zeroed, int64_t zeroes, bool measured) {
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
    const bool inside = j < end;
    const Row<T> row = measure_row(batch, distance, prepared.shift, scale, inside ? j : batch.candidates);
    flags |= row.flags;
    if (inside && t % 8 == 0) {
      prepared.scale[j] = row.scale;
      prepared.norms[j] = row.norm;
    }
    if constexpr (sizeof(T) == 4) {
      if (panels.numbers != Numbers::none && j - begin < (end - begin + 15) / 16 * 16) {
        write_panels(batch, cosine ? nullptr : prepared.shift, row, panels, j, group < own, inside);
      }
    }
  }
  const int too_long = __syncthreads_or(flags & kTooLong), not_finite = __syncthreads_or(flags & kNotFinite);
  if (t == 0) prepared.flags[group] = not_finite ? kNotFinite : too_long ? kTooLong : 0;
}

}  // namespace triplet::gpu
