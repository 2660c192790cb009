// Loss and gradients of the mined rows, on CUDA. Each anchor pulls at two rows, so a row's gradient has its own two
// pairs and those of the anchors that chose it. These are listed row by row with a counting sort and added in the order
// of the pairs, so that bits repeat.
#pragma once

#include "cuda/decide.cuh"

namespace triplet::gpu {

// The mined rows and the exact loss of each anchor. One warp an anchor.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads)
    finish(Batch<In> batch, Settings settings, Prepared<T> prepared, Winners winners, Outputs<T> out) {
  __shared__ Chamber chamber;
  const int a = warp_row();
  const bool inside = a < batch.anchors, sound = *prepared.unsound == 0, semihard = settings.mining == Mining::semihard;
  const auto chosen = [&](int slot, bool farthest, bool wanted) {
    const Council<In, T> council{batch, settings.distance, prepared, winners, slot, farthest};
    return choose(council, inside && sound && wanted ? a : -1, chamber);
  };
  const int positive = !semihard ? chosen(0, true, true) : inside ? int(out.positive[a]) : -1;
  int negative = semihard ? chosen(2, false, positive >= 0) : -1;
  const int nearest = chosen(1, semihard, positive >= 0 && negative < 0);  // semihard: the farthest
  if (negative < 0) negative = nearest;
  if (!inside) return;
  const bool takes_part = sound && positive >= 0 && negative >= 0;
  T loss = sound ? T(0) : T(NAN);
  if (takes_part) {
    loss = cost(measure_pair(batch, settings.distance, prepared.scale, a, positive).distance -
                    measure_pair(batch, settings.distance, prepared.scale, a, negative).distance,
                settings);
  }
  if (lane() == 0) {
    out.losses[a] = loss;
    out.positive[a] = takes_part ? positive : -1;
    out.negative[a] = takes_part ? negative : -1;
    out.counts[a] = takes_part;
  }
}

// ------------------------------------------------------------------------------------------------------------
// gradients

// A pair's part in the gradients: factor of the direction between its rows; for cosine also their cosine.
template <typename T>
struct Pull {
  T factor, cosine;
};

// Pairs 0..anchors: (anchor, positive); anchors..2 anchors: (anchor, negative).
template <typename T>
struct Pairs {
  Pull<T>* pulls;  // (2 anchors,)
  int* chosen;     // (2 anchors,) the positive's or negative's row, -1 where the anchor takes no part
};

// The pairs that chose a row r: listed[starts[r]] .. listed[starts[r] + chosen_by[r] - 1], ascending.
struct Lists {
  int* chosen_by;          // (candidates,), from 0
  int* placed;             // (candidates,), from 0: how many are in the list so far
  int* used;               // (), from 0: end of the lists so far
  int* starts;             // (candidates,)
  int *unsorted, *listed;  // (2 anchors,)
};

// One warp an anchor.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads)
    weigh_pairs(Batch<In> batch, Settings settings, const T* scale, Upstream<T> up, Pairs<T> pairs, Lists lists) {
  const int a = warp_row();
  if (a >= batch.anchors) return;
  const int positive = int(up.positive[a]), negative = int(up.negative[a]);
  Pull<T> toward{0, 0}, away{0, 0};
  if (positive >= 0) {
    const Pair<T> near = measure_pair(batch, settings.distance, scale, a, positive);
    const Pair<T> far = measure_pair(batch, settings.distance, scale, a, negative);
    const T weight = cost_slope(near.distance - far.distance, settings) * up.weight(a, settings.reduction);
    toward = {factor_of(settings.distance, weight, near.distance), near.cosine};
    away = {factor_of(settings.distance, -weight, far.distance), far.cosine};
  }
  if (lane() == 0) {
    pairs.pulls[a] = toward;
    pairs.pulls[batch.anchors + a] = away;
    pairs.chosen[a] = positive;
    pairs.chosen[batch.anchors + a] = negative;
    if (positive >= 0) {
      atomicAdd(lists.chosen_by + positive, 1);
      atomicAdd(lists.chosen_by + negative, 1);
    }
  }
}

// Room for each row's list. Which row comes first is left to chance: it shows in no result. One thread a row.
__global__ static void __launch_bounds__(kThreads) allot(Lists lists, int candidates) {
  const int row = int(blockIdx.x) * kThreads + int(threadIdx.x);
  const int size = row < candidates ? lists.chosen_by[row] : 0;
  int end = size;  // of this lane's list, among those of the warp
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int before = __shfl_up_sync(kAllLanes, end, unsigned(lanes));
    if (lane() >= lanes) end += before;
  }
  int begin = 0;
  if (lane() == 31) begin = atomicAdd(lists.used, end);
  begin = __shfl_sync(kAllLanes, begin, 31);
  if (row < candidates) lists.starts[row] = begin + end - size;
}

// Every pair into its row's list, in any order. One thread a pair.
__global__ static void __launch_bounds__(kThreads) place_pairs(const int* chosen, int pairs, Lists lists) {
  const int64_t pair = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= pairs || chosen[pair] < 0) return;
  const int row = chosen[pair];
  lists.unsorted[lists.starts[row] + atomicAdd(lists.placed + row, 1)] = int(pair);
}

// And at the place that it has in the order of the list.
__global__ static void __launch_bounds__(kThreads) sort_pairs(const int* chosen, int pairs, Lists lists) {
  const int64_t pair = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= pairs || chosen[pair] < 0) return;
  const int row = chosen[pair], *list = lists.unsorted + lists.starts[row];
  int before = 0;
  for (int i = 0; i < lists.chosen_by[row]; ++i) before += list[i] < int(pair);
  lists.listed[lists.starts[row] + before] = int(pair);
}

// sum += the pull of a pair on row x, whose other row is y
template <typename In, typename T>
__device__ void pull(const Batch<In>& batch, Distance distance, const T* scale, const Pull<T>& pull, int x, int y,
                     int begin, T (&sum)[kStrip]) {
  const In *from = batch.row(x), *to = batch.row(y);
  const bool cosine = distance == Distance::cosine;
  const T x_scale = cosine ? scale[x] : T(1), y_scale = cosine ? scale[y] : T(1);
  // d(1 - cos)/dx = (cos x/|x| - y/|y|) / |x|; where |x| is clamped it is a constant, and the first part falls away
  const T along = !cosine ? T(1) : x_scale < T(1e12) ? pull.cosine : T(0);
#pragma unroll
  for (int c = 0; c < kStrip; ++c) {
    const int d = begin + c * 32 + lane();
    if (d < batch.width) {
      const T step = along * (T(widen(from[d])) * x_scale) - T(widen(to[d])) * y_scale;
      sum[c] = fma(pull.factor * x_scale, step, sum[c]);
    }
  }
}

// Gradient of one row. One block a row: its warps share the list of the anchors that chose the row, since a row can be
// the choice of many. For double a processor holds 4 blocks at least: without that bound ptxas spills.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 4 : 0)
    row_gradient(Batch<In> batch, Distance distance, const T* scale, const int64_t* count, Pairs<T> pairs, Lists lists,
                 In* gradients) {
  __shared__ Shared<T, kWarps * kStripWidth> parts;
  const int row = int(blockIdx.x), warp = int(threadIdx.x) / 32;
  const bool is_anchor = row < batch.anchors, sound = *count >= 0;
  In* gradient = gradients + int64_t(row) * batch.width;
  const int *list = lists.listed + lists.starts[row], size = lists.chosen_by[row];
  const auto add = [&](int begin, T(&sum)[kStrip]) {
    if (is_anchor && warp < 2) {
      const int pair = warp * batch.anchors + row, other = pairs.chosen[pair];
      if (other >= 0) pull(batch, distance, scale, pairs.pulls[pair], row, other, begin, sum);
    }
    for (int i = warp; i < size; i += kWarps) {  // as the choice of others
      pull(batch, distance, scale, pairs.pulls[list[i]], row, list[i] % batch.anchors, begin, sum);
    }
  };
  sum_row<T>(batch.width, parts, add, [&](int d, T sum) { narrow(sound ? sum : T(NAN), gradient[d]); });
}

}  // namespace triplet::gpu
