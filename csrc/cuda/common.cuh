// The triplet loss on CUDA: what all kernels share. Preparation of a batch: prepare.cuh; search for the mined rows:
// search.cuh, search_simt.cuh, search_mma.cuh; which they are where rounding leaves doubt: decide.cuh; their loss and
// gradients: mined.cuh; all triplets: all.cuh, triplets.cuh, pull.cuh; the order of the launches: launch.cuh. No
// PyTorch headers: tests/native/emulation.cpp compiles the same source with g++.
#pragma once

#ifdef __CUDACC__
#include "cuda/device.cuh"
#endif
#include "triplet.h"

namespace triplet::gpu {

using Key = unsigned long long;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256, kWarps = kThreads / 32;  // of every block

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(Bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
__device__ inline float widen(Float16 x) { return half_to_float(x.bits); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(double x, double& out) { out = x; }
__device__ inline void narrow(float x, Float16& out) { out.bits = float_to_half(x); }
__device__ inline void narrow(float x, Bfloat16& out) {  // to nearest even
  const uint32_t bits = bits_as<uint32_t>(x);
  out.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

constexpr int kGroup = 64;  // rows that share a label filter: of the anchors and of the others, in order

// (candidates, width) rows, contiguous; the first of them are the anchors.
template <typename In>
struct Batch {
  const In* x;
  const int64_t* labels;
  int anchors, candidates, width;
  bool vectors;  // rows can be read four values at a time

  __device__ const In* row(int j) const { return x + int64_t(j) * width; }
  __host__ __device__ int own_groups() const { return (anchors + kGroup - 1) / kGroup; }
  __host__ __device__ int groups() const { return own_groups() + (candidates - anchors + kGroup - 1) / kGroup; }
};

// Which labels a group of rows may have, as bits of a hash: (groups, kThreads). Tiles of two groups without a bit in
// common have no positives.
struct Filters {
  uint32_t* words;

  template <typename In>
  __device__ const uint32_t* of(const Batch<In>& batch, int row) const {
    const int group = row < batch.anchors ? row / kGroup : batch.own_groups() + (row - batch.anchors) / kGroup;
    return words + int64_t(group) * kThreads;
  }
};

// Rounding moves |x - y|^2 of what the search sees, as |x|^2 + |y|^2 - 2 x.y, by the slacks of a pair's candidate and
// of its anchor at most. Those of cosine candidates are 0.
struct Rounding {
  float share, least, pair;
  __device__ float of_candidate(float norm) const { return norm * share + least; }
  __device__ float of_anchor(float norm) const { return of_candidate(norm) + pair; }
};

// What a search sees of a row x is x * scale[row] - shift: for cosine x / |x|, for the euclidean distances centred and
// scaled by a power of two, so that neither cancellation nor overflow spoils the order of the distances.
template <typename T>
struct Prepared {
  T *scale, *norms;  // (candidates,); norms: squared length of what the search sees, 1 for cosine
  T* shift;          // (width,), and zeros up to a multiple of four
  int* flags;        // (groups,) what is wrong with rows of a group, below
  int groups;
  Filters filters;  // null: nothing will be searched
};

// What tensor cores are given for a row: its own numbers, one product a pair, or each number as the sum of two of
// float16, three products.
enum class Numbers { none, bfloat16, float16, split };

// Rows for tensor cores: each as the search sees it, times a power of two. Blocks of 16 rows and 16 columns are in the
// order in which the lanes of a warp hand them to mma.m16n8k16. Lane l has four pairs of neighbours side by side, its
// part of a first operand: columns l % 4 * 2 of row l / 4 and of the row 8 below; then, of both, the columns 8 further.
// Those of either row are its part of a second operand.
struct Panels {
  Numbers numbers;
  uint32_t *high, *low;  // (blocks, steps, 32 lanes, 4) pairs of neighbours; low: of split numbers
  float* rests;          // (candidates,) what a row's products are to be multiplied by
  int own, blocks;       // of 16 rows: those of the anchors, and with those of the others
  int steps;             // of 16 columns, an even number; zeros beyond the width

  // of a block's pairs
  __device__ int64_t at(int block, int step) const {
    return (int64_t(block < blocks ? block : blocks - 1) * steps + step) * 128;
  }
};

constexpr int kTooLong = 1, kNotFinite = 2;  // for the search's arithmetic; for any

// What is wrong with any row. Every thread of the block must call.
template <typename T>
__device__ int flags_of_all(const Prepared<T>& prepared) {
  int flags = 0;
  for (int g = int(threadIdx.x); g < prepared.groups; g += kThreads) flags |= prepared.flags[g];
  const int too_long = __syncthreads_or(flags & kTooLong), not_finite = __syncthreads_or(flags & kNotFinite);
  return (too_long ? kTooLong : 0) | (not_finite ? kNotFinite : 0);
}

struct Total {
  double sum;
  int64_t count;
};

// What the forward pass gives. Null: not wanted.
template <typename T>
struct Outputs {
  T *losses, *loss;              // (anchors,); their sum or mean
  int64_t* count;                // what a mean is taken over; -1: something is not finite
  int64_t *positive, *negative;  // (anchors,) rows; -1: takes no part; mining "all": -1
  Total* totals;                 // (blocks,) of the anchors of each block
  int* done;                     // from 0: blocks that have added theirs
};

// The upstream gradient, and what the loss is a mean over.
template <typename T>
struct Upstream {
  const T* grad;  // () or, for Reduction::none, (anchors,) of this stride
  int64_t stride;
  const int64_t* count;

  // what an anchor's loss weighs
  __device__ T weight(int anchor, Reduction reduction) const {
    const T given = grad[reduction == Reduction::none ? anchor * stride : 0];
    return reduction == Reduction::mean && *count > 1 ? given / T(*count) : given;
  }
};

// Order of the bits is order of value; no number gives 0.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ inline float unordered(uint32_t bits) { return bits_as<float>(bits >> 31 ? bits & 0x7fffffffu : ~bits); }

// A candidate as the search keeps it: how good it may be (search.cuh), then its row, the lowest first. 0: none.
__device__ inline Key key_of(float value, int row) { return Key(ordered(value)) << 32 | ~uint32_t(row); }
__device__ inline float value_of(Key key) { return unordered(uint32_t(key >> 32)); }  // NaN: none
__device__ inline int row_of(Key key) { return key == 0 ? -1 : int(~uint32_t(key)); }

constexpr int kSlots = 3;  // farthest positive; negative; nearest negative beyond the positive
constexpr int kKept = 16;  // candidates of each

// What the search leaves of each anchor for decide.cuh.
struct Winners {
  Key* kept;         // (slots, anchors, kKept) the best candidates, the best of them first
  uint32_t* bounds;  // (slots, anchors) `ordered`: one candidate at least is as good as this. 0: none is known
  float* limits;     // (anchors,) semihard: the order of the positive, and what decides that order
  double* decisive_limits;
  int anchors;
  Rounding rounding;

  __device__ Key* of(int slot, int anchor) const { return kept + (int64_t(slot) * anchors + anchor) * kKept; }
  __device__ uint32_t* bound(int slot, int anchor) const { return bounds + int64_t(slot) * anchors + anchor; }
};

// What a candidate must reach to be of interest, by a bound.
__device__ inline float floor_of(uint32_t bound) { return bound ? unordered(bound) : -3.4028235e38f; }

__device__ inline int warp_row() { return int(blockIdx.x * kWarps + threadIdx.x / 32); }  // one warp a row
__device__ inline int lane() { return int(threadIdx.x % 32); }

template <typename T>
__device__ inline T sum_of_warp(T x) {  // the same bits in every lane
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

template <typename T>
__device__ inline T sum_of_octet(T x) {  // of the eight lanes of an octet
#pragma unroll
  for (int lanes = 4; lanes; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

template <typename T>
__device__ inline T max_of_warp(T x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

// What a warp knows of a pair of rows: its distance and, for cosine, the cosine.
template <typename T>
struct Pair {
  T distance, cosine;
};

// The exact distance of rows a, b, by differences, in every lane of a warp. `unit`: a power of two at which squares of
// the differences stay within the range of T.
template <typename In, typename T>
__device__ Pair<T> measure_pair(const Batch<In>& batch, Distance distance, const T* scale, int a, int b, T unit = 1) {
  const In *x = batch.row(a), *y = batch.row(b);
  T sum = 0;
  if (distance == Distance::cosine) {
    const T x_scale = scale[a], y_scale = scale[b];
    for (int d = lane(); d < batch.width; d += 32) sum = fma(T(widen(x[d])) * x_scale, T(widen(y[d])) * y_scale, sum);
    sum = sum_of_warp(sum);
    return {1 - sum, sum};
  }
  const T inverse = 1 / unit;
  for (int d = lane(); d < batch.width; d += 32) {
    const T gap = (T(widen(x[d])) - T(widen(y[d]))) * inverse;
    sum = fma(gap, gap, sum);
  }
  sum = sum_of_warp(sum);
  return {distance == Distance::euclidean ? sqrt(sum) * unit : sum * unit * unit, 0};
}

// Of a pair whose distance weighs `weight` in the loss: what its two rows' difference (cosine: direction) is pulled by.
template <typename T>
__device__ inline T factor_of(Distance distance, T weight, T apart) {
  if (distance == Distance::cosine) return weight;
  if (distance == Distance::sqeuclidean) return 2 * weight;
  return apart > 0 ? weight / apart : T(0);
}

constexpr int kStrip = 4, kStripWidth = 32 * kStrip;  // columns of a lane and of a warp at a time

// A row of `width` sums that the warps of a block share: add(begin, sum) adds a warp's part for columns begin + c * 32
// + lane(), store(d, sum) gets the whole. The warps' parts are added in a fixed order.
template <typename T, typename Add, typename Store>
__device__ void sum_row(int width, Shared<T, kWarps * kStripWidth>& parts, Add add, Store store) {
  const int t = int(threadIdx.x), warp = t / 32;
  for (int begin = 0; begin < width; begin += kStripWidth) {
    T sum[kStrip] = {};
    add(begin, sum);
#pragma unroll
    for (int c = 0; c < kStrip; ++c) parts.set(warp * kStripWidth + c * 32 + lane(), sum[c]);
    __syncthreads();
    if (t < kStripWidth && begin + t < width) {
      T total = 0;
      for (int w = 0; w < kWarps; ++w) total += parts.get(w * kStripWidth + t);
      store(begin + t, total);
    }
    __syncthreads();
  }
}

// The total over a block, in thread 0; added in a fixed order.
__device__ inline Total total_of_block(Total mine, Shared<Total, kThreads>& totals) {
  const int t = int(threadIdx.x);
  totals.set(t, mine);
  for (int half = kThreads / 2; half; half /= 2) {
    __syncthreads();
    if (t < half) {
      const Total a = totals.get(t), b = totals.get(t + half);
      totals.set(t, {a.sum + b.sum, a.count + b.count});
    }
  }
  return totals.get(t);
}

// The loss and its count from the totals of all blocks, by the last one that comes here. `own`: that of this one, the
// `block`-th, in thread 0. Every thread must call.
template <typename T>
__device__ void reduce(Total own, int block, int blocks, Reduction reduction, bool finite, const Outputs<T>& out,
                       Shared<Total, kThreads>& totals) {
  const int t = int(threadIdx.x);
  int last = 0;
  if (t == 0) {
    out.totals[block] = own;
    __threadfence();
    last = atomicAdd(out.done, 1) == blocks - 1;
    __threadfence();
  }
  if (!__syncthreads_or(last)) return;
  Total total{0, 0};
  for (int b = t; b < blocks; b += kThreads) {
    total.sum += out.totals[b].sum;
    total.count += out.totals[b].count;
  }
  total = total_of_block(total, totals);
  if (t) return;
  *out.count = finite ? total.count : -1;
  const bool mean = reduction == Reduction::mean && total.count;
  if (out.loss) *out.loss = T(mean ? total.sum / double(total.count) : total.sum);
}

}  // namespace triplet::gpu
