// Loss and gradients of the mined rows, on CUDA. Each anchor pulls at two rows, so a row's gradient has its own two
// pairs and those of the anchors that chose it. These are listed row by row and added in a fixed order, so that bits
// repeat.
#pragma once

#include "cuda/decide.cuh"

namespace triplet::gpu {

// A pair's part in the gradients, for a loss that weighs 1: factor of the direction between its rows; for cosine also
// their cosine.
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

constexpr int kListed = 16;  // pairs of a row

// The pairs that chose a row, for the first `rows` rows.
struct Lists {
  int* chosen_by;  // (rows,), from 0: how many
  int* pairs;      // (rows, kListed) in any order. Where more chose a row, not all of them
  int rows;

  __device__ void add(int row, int pair) const {
    if (row >= rows) return;
    const int place = atomicAdd(chosen_by + row, 1);
    if (place < kListed) pairs[int64_t(row) * kListed + place] = pair;
  }
};

// The loss of an anchor with these rows, -1 for both where it takes no part; and its pairs. One warp an anchor.
template <typename In, typename T>
__device__ T settle(const Batch<In>& batch, const Settings& settings, const T* scale, int a, int positive, int negative,
                    const Pairs<T>& pairs, const Lists& lists) {
  const bool takes_part = positive >= 0 && negative >= 0;
  Pull<T> toward{0, 0}, away{0, 0};
  T loss = 0;
  if (takes_part) {
    const Pair<T> near = measure_pair(batch, settings.distance, scale, a, positive);
    const Pair<T> far = measure_pair(batch, settings.distance, scale, a, negative);
    const T gap = near.distance - far.distance, slope = cost_slope(gap, settings);
    loss = cost(gap, settings);
    toward = {factor_of(settings.distance, slope, near.distance), near.cosine};
    away = {factor_of(settings.distance, -slope, far.distance), far.cosine};
  }
  if (lane() == 0) {
    pairs.pulls[a] = toward;
    pairs.pulls[batch.anchors + a] = away;
    pairs.chosen[a] = takes_part ? positive : -1;
    pairs.chosen[batch.anchors + a] = takes_part ? negative : -1;
    if (takes_part) {
      lists.add(positive, a);
      lists.add(negative, batch.anchors + a);
    }
  }
  return loss;
}

// The mined rows and the exact loss of each anchor, the loss of all, and the pairs. One warp an anchor.
// Registers as for choose_positives.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 0)
    finish(Batch<In> batch, Settings settings, Prepared<T> prepared, Winners winners, Pairs<T> pairs, Lists lists,
           Outputs<T> out) {
  __shared__ Chamber chamber;
  __shared__ Shared<Total, kThreads> totals;
  const int a = warp_row(), flags = flags_of_all(prepared);
  const bool inside = a < batch.anchors, semihard = settings.mining == Mining::semihard;
  const auto chosen = [&](int slot, bool farthest, bool wanted) {
    const Council<In, T> council{batch, settings.distance, prepared, winners, slot, farthest};
    return choose(council, inside && wanted ? a : -1, flags, chamber);
  };
  const int positive = !semihard ? chosen(0, true, true) : inside ? pairs.chosen[a] : -1;
  int negative = semihard ? chosen(2, false, positive >= 0) : -1;
  const int nearest = chosen(1, semihard, positive >= 0 && negative < 0);  // semihard: the farthest
  if (negative < 0) negative = nearest;
  const bool takes_part = positive >= 0 && negative >= 0, finite = !(flags & kNotFinite);
  T loss = 0;
  if (inside) {
    loss = settle(batch, settings, static_cast<const T*>(prepared.scale), a, positive, negative, pairs, lists);
    if (!finite) loss = T(NAN);
    if (lane() == 0) {
      if (out.losses) out.losses[a] = loss;
      if (out.positive) out.positive[a] = takes_part ? positive : -1;
      if (out.negative) out.negative[a] = takes_part ? negative : -1;
    }
  }
  if (lane() == 0) totals.set(int(threadIdx.x) / 32, {double(loss), takes_part});
  __syncthreads();
  Total own{0, 0};
  for (int w = 0; threadIdx.x == 0 && w < kWarps; ++w) {
    own.sum += totals.get(w).sum;
    own.count += totals.get(w).count;
  }
  reduce(own, int(blockIdx.x), int(gridDim.x), settings.reduction, finite, out, totals);
}

// ------------------------------------------------------------------------------------------------------------
// gradients

// The pairs of mined rows that are given. One warp an anchor.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads)
    weigh_pairs(Batch<In> batch, Settings settings, const T* scale, const int64_t* positive, const int64_t* negative,
                Pairs<T> pairs, Lists lists) {
  const int a = warp_row();
  if (a < batch.anchors) settle(batch, settings, scale, a, int(positive[a]), int(negative[a]), pairs, lists);
}

// What a pair adds to the gradient of one of its rows, x: factor * (along * x - y), where cosine has both of length 1.
template <typename T>
struct Term {
  T factor, along, y_scale;
  int y;
};

template <typename In, typename T>
struct Puller {
  const Batch<In>& batch;
  const Settings& settings;
  const T* scale;
  const Upstream<T>& up;
  const Pairs<T>& pairs;

  __device__ T scale_of(int row) const { return settings.distance == Distance::cosine ? scale[row] : T(1); }

  // pair -1: none
  __device__ Term<T> term(int x, int pair) const {
    const int anchor = pair < batch.anchors ? pair : pair - batch.anchors, chosen = pair < 0 ? -1 : pairs.chosen[pair];
    if (chosen < 0) return {0, 1, scale_of(x), x};
    const Pull<T> pull = pairs.pulls[pair];
    const int y = x == anchor ? chosen : anchor;
    const T x_scale = scale_of(x), factor = pull.factor * up.weight(anchor, settings.reduction) * x_scale;
    // d(1 - cos)/dx = (cos x/|x| - y/|y|) / |x|; where |x| is clamped it is a constant, and the first part falls away
    const T along = settings.distance != Distance::cosine ? T(1) : x_scale < T(1e12) ? pull.cosine : T(0);
    return {factor, along, scale_of(y), y};
  }

  // The lane's values of a row from column `begin` on.
  __device__ void load(int row, T row_scale, int begin, T (&values)[kStrip]) const {
#pragma unroll
    for (int c = 0; c < kStrip; ++c) {
      const int d = begin + c * 32 + lane();
      values[c] = d < batch.width ? T(widen(batch.row(row)[d])) * row_scale : T(0);
    }
  }

  // sum += the terms that these lanes have for row x, in their order
  __device__ void add(int x, const Term<T>& own, unsigned lanes, int begin, T (&sum)[kStrip]) const {
    constexpr int kAtOnce = 4;  // rows on their way from memory
    T from[kStrip], to[kAtOnce][kStrip], factor[kAtOnce], along[kAtOnce];
    load(x, scale_of(x), begin, from);
    while (lanes) {
      const unsigned all = lanes;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int source = lanes ? __ffsll(lanes) - 1 : 0;
        factor[k] = __shfl_sync(kAllLanes, own.factor, source);
        along[k] = __shfl_sync(kAllLanes, own.along, source);
        load(__shfl_sync(kAllLanes, own.y, source), __shfl_sync(kAllLanes, own.y_scale, source), begin, to[k]);
        lanes &= lanes - 1;
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (k >= __popc(all)) break;
#pragma unroll
        for (int c = 0; c < kStrip; ++c) sum[c] = fma(factor[k], along[k] * from[c] - to[k][c], sum[c]);
      }
    }
  }

  // The pair of the row itself that a lane has, of two.
  __device__ int own_pair(int row) const {
    return lane() < 2 && row < batch.anchors ? lane() * batch.anchors + row : -1;
  }

  // sum += the terms of all pairs that chose row x, by a warp's share of the pairs
  __device__ void add_all(int x, int begin, T (&sum)[kStrip]) const {
    constexpr int kAtOnce = 8;  // times 32 pairs
    const int count = 2 * batch.anchors;
    const auto chose = [&](int pair) { return pair < count && pairs.chosen[pair] == x; };
    for (int first = int(threadIdx.x) / 32 * 32 * kAtOnce; first < count; first += kThreads * kAtOnce) {
      bool any = false;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) any |= chose(first + 32 * k + lane());
      if (!__any_sync(kAllLanes, any)) continue;
#pragma unroll 1
      for (int k = 0; k < kAtOnce; ++k) {
        const int pair = first + 32 * k + lane();
        const bool mine = chose(pair);
        add(x, term(x, mine ? pair : -1), __ballot_sync(kAllLanes, mine), begin, sum);
      }
    }
  }
};

// The pairs of a row, in a fixed order: its own two, then those listed. One to a lane, -1: none. One warp.
template <typename In, typename T>
__device__ int pair_of_lane(const Puller<In, T>& puller, const Lists& lists, int row, int chosen_by) {
  const int listed = lane() < chosen_by ? lists.pairs[int64_t(row) * kListed + lane()] : 0;
  int pair = puller.own_pair(row);
  for (int k = 0; k < chosen_by; ++k) {
    const int other = __shfl_sync(kAllLanes, listed, k);
    const int before = __popc(__ballot_sync(kAllLanes, lane() < chosen_by && listed < other));
    if (lane() == 2 + before) pair = other;
  }
  return pair;
}

// Gradients of the first rows. One warp a row; where too many chose it to be listed, the warps of the block look
// through all pairs.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads) row_gradient(Batch<In> batch, Settings settings, const T* scale,
                                                         Upstream<T> up, Pairs<T> pairs, Lists lists, In* gradients) {
  __shared__ Shared<T, kWarps * kStripWidth> parts;
  __shared__ Shared<int, kWarps> crowded;
  const int row = warp_row(), warp = int(threadIdx.x) / 32;
  const int chosen_by = row < lists.rows ? lists.chosen_by[row] : 0;
  const bool finite = *up.count >= 0;
  const Puller<In, T> puller{batch, settings, scale, up, pairs};
  const auto store = [&](int x, int d, T sum) {
    narrow(finite ? sum : T(NAN), gradients[int64_t(x) * batch.width + d]);
  };
  if (lane() == 0) crowded.set(warp, chosen_by > kListed ? row : -1);
  if (row < lists.rows && chosen_by <= kListed) {
    const int pair = pair_of_lane(puller, lists, row, chosen_by);
    const Term<T> own = puller.term(row, pair);
    const unsigned lanes = __ballot_sync(kAllLanes, pair >= 0);
    for (int begin = 0; begin < batch.width; begin += kStripWidth) {
      T sum[kStrip] = {};
      puller.add(row, own, lanes, begin, sum);
#pragma unroll
      for (int c = 0; c < kStrip; ++c) {
        if (begin + c * 32 + lane() < batch.width) store(row, begin + c * 32 + lane(), sum[c]);
      }
    }
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    const int x = crowded.get(w);
    if (x < 0) continue;
    const auto add = [&](int begin, T(&sum)[kStrip]) {
      if (warp == 0) puller.add(x, puller.term(x, puller.own_pair(x)), 3, begin, sum);
      puller.add_all(x, begin, sum);
    };
    sum_row<T>(batch.width, parts, add, [&](int d, T sum) { store(x, d, sum); });
  }
}

}  // namespace triplet::gpu
