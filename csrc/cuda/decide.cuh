// Which of the candidates that the search kept is meant. Where rounding leaves several, their rows' differences decide,
// in double and as in every other implementation (`Geometry::decisive`, csrc/cpu/geometry.inc), and between equals the
// lower row.
#pragma once

#include "cuda/common.cuh"

namespace triplet::gpu {

// For cosine, squares of doubles may overflow: the greatest power of two up to 1 / |x| brings them near 1.
__device__ inline float unit_of(float) { return 1; }
__device__ inline double unit_of(double scale) {
  const double power = bits_as<double>(bits_as<uint64_t>(scale) & 0x7ff0000000000000u);
  return power > 0 ? power : 2.2250738585072014e-308;  // the smallest that is not denormal
}

// What orders the candidates b of an anchor a, the nearest first: |a - b|^2 or, for cosine, -cos |cos| |a|^2. An octet
// of lanes takes a pair: column k belongs to sum k % 8. Every lane of a warp must call.
template <typename In, typename T>
__device__ double decisive(const Batch<In>& batch, Distance distance, const T* scale, int a, int b) {
  const In *x = batch.row(a), *y = batch.row(b);
  if (distance != Distance::cosine) {
    double sum = 0;
    for (int d = lane() % 8; d < batch.width; d += 8) {
      const double gap = double(T(widen(x[d]) - widen(y[d])));
      sum = __dadd_rn(sum, __dmul_rn(gap, gap));
    }
    return sum_of_octet(sum);
  }
  const double of_a = unit_of(scale[a]), of_b = unit_of(scale[b]), least = 1e-24 * of_b * of_b;
  double product = 0, square = 0;
  for (int d = lane() % 8; d < batch.width; d += 8) {
    const double p = double(widen(x[d])) * of_a, q = double(widen(y[d])) * of_b;
    product = __dadd_rn(product, __dmul_rn(p, q));
    square = __dadd_rn(square, __dmul_rn(q, q));
  }
  product = sum_of_octet(product);
  square = sum_of_octet(square);
  return product == 0 ? 0 : -product * fabs(product) / (square > least ? square : least);
}

// What the search has for a value of `decisive`, but for its rounding: the squared distance of what it sees, for cosine
// 2 - 2 cos.
template <typename T>
__device__ inline double squared_of(Distance distance, double decisive, T scale_of_anchor) {
  const double scale = double(scale_of_anchor);
  if (distance != Distance::cosine) return decisive * scale * scale;
  const double size = 2 * sqrt(fabs(decisive)) * (scale / double(unit_of(scale_of_anchor)));
  return decisive < 0 ? 2 - size : 2 + size;
}

// A candidate and its `decisive`, the better the greater; at -1: none.
struct Choice {
  double value;
  int row;
};

__device__ inline Choice better(Choice x, Choice y) {
  if (x.row < 0 || y.row < 0) return x.row < 0 ? y : x;
  return y.value > x.value || (y.value == x.value && y.row < x.row) ? y : x;
}

__device__ inline Choice best_of_octets(Choice x) {
#pragma unroll
  for (int lanes = 8; lanes < 32; lanes *= 2) {
    x = better(x, {__shfl_xor_sync(kAllLanes, x.value, lanes), __shfl_xor_sync(kAllLanes, x.row, lanes)});
  }
  return x;
}

// What one of an anchor's mined rows is chosen by.
template <typename In, typename T>
struct Council {
  const Batch<In>& batch;
  const Distance distance;
  const Prepared<T>& prepared;
  const Winners& winners;
  const int slot;
  const bool farthest;

  // Candidate j of anchor a, where the octet has one; must be called by every lane of a warp.
  __device__ Choice weigh(int a, int j, bool may) const {
    const double value = decisive(batch, distance, prepared.scale, a, may ? j : a);
    if (slot == 2 && !(value > winners.decisive_limits[a])) may = false;
    return {farthest ? value : -value, may ? j : -1};
  }

  // One warp an anchor: the best of those kept. Only candidates below `end` may be better still.
  __device__ Choice of_kept(int a, int& end) const {
    const unsigned bound = *winners.bound(slot, a);
    const Key key = lane() < kKept ? winners.of(slot, a)[lane()] : 0;
    const int n = __popc(__ballot_sync(kAllLanes, value_of(key) >= floor_of(bound)));  // the first n
    end = n < kKept ? 0 : batch.candidates;
    if (n == 1 && bound) return {0, __shfl_sync(kAllLanes, row_of(key), 0)};
    Choice best{0, -1};
    for (int first = 0; first < n; first += 4) {
      const int place = first + lane() / 8, row = __shfl_sync(kAllLanes, row_of(key), place);
      best = better(best, weigh(a, row, place < n));
    }
    best = best_of_octets(best);
    const float last = __shfl_sync(kAllLanes, value_of(key), kKept - 1);
    if (n == kKept && best.row >= 0) {
      const double squared = squared_of(distance, farthest ? best.value : -best.value, prepared.scale[a]);
      if ((farthest ? squared : -squared) > last + winners.rounding.of_anchor(float(prepared.norms[a]))) end = 0;
      if (distance != Distance::cosine && !farthest && best.value == 0) end = best.row;  // nothing is nearer
    }
    return best;
  }

  // A share of the candidates below `end`, by one warp of a block.
  __device__ Choice of_all(int a, int end) const {
    const int64_t label = batch.labels[a];
    Choice best{0, -1};
    for (int first = int(threadIdx.x) / 32 * 4; first < end; first += kWarps * 4) {
      const int j = first + lane() / 8;
      const bool may = j < end && j != a && (batch.labels[j] == label) == (slot == 0);
      if (__any_sync(kAllLanes, may)) best = better(best, weigh(a, j, may));
    }
    return best_of_octets(best);
  }
};

struct Chamber {
  Shared<int, kWarps> ends;
  Shared<Choice, kWarps> shares;
};

// The row of each warp's anchor, -1: none; anchor -1: the warp has none. Where too few candidates were kept to tell, or
// the search could not do its work (`flags`), the warps of the block share all of them. Every thread of the block must
// call.
template <typename In, typename T>
__device__ int choose(const Council<In, T>& council, int anchor, int flags, Chamber& chamber) {
  const int warp = int(threadIdx.x) / 32, first = int(blockIdx.x) * kWarps;
  Choice best{0, -1};
  int end = anchor < 0 || flags & kNotFinite ? 0 : council.batch.candidates;
  if (end && !(flags & kTooLong)) best = council.of_kept(anchor, end);
  if (lane() == 0) chamber.ends.set(warp, end);
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    if (chamber.ends.get(w) == 0) continue;
    const Choice share = council.of_all(first + w, chamber.ends.get(w));
    if (lane() == 0) chamber.shares.set(warp, share);
    __syncthreads();
    for (int other = 0; warp == w && other < kWarps; ++other) best = better(best, chamber.shares.get(other));
    __syncthreads();
  }
  __syncthreads();
  return best.row;
}

// Semihard mining: the positives, and how far they are. One warp an anchor. For double a processor holds 2 blocks at
// least: for more, ptxas spills.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 0)
    choose_positives(Batch<In> batch, Distance distance, Prepared<T> prepared, Winners winners, int* positive) {
  __shared__ Chamber chamber;
  const int a = warp_row(), flags = flags_of_all(prepared);
  const bool inside = a < batch.anchors;
  const Council<In, T> council{batch, distance, prepared, winners, 0, true};
  const int row = choose(council, inside ? a : -1, flags, chamber);
  if (!inside) return;
  const double value = row < 0 ? INFINITY : decisive(batch, distance, prepared.scale, a, row);
  if (lane() == 0) {
    positive[a] = row;
    winners.decisive_limits[a] = value;
    winners.limits[a] = row < 0 ? INFINITY : float(squared_of(distance, value, prepared.scale[a]));
  }
}

}  // namespace triplet::gpu
