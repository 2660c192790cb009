// The loss of all triplets from the distances that all.cuh leaves, a block an anchor, and what each pair of rows weighs
// in the gradients.
#pragma once

#include "cuda/all.cuh"

namespace triplet::gpu {

constexpr int kFar = 8;  // negatives of a thread at a time

// Up to kThreads positives of a block's anchor.
template <typename T>
struct Circle {
  Shared<int, kThreads> rows;
  Shared<T, kThreads> near;          // their distances plus `margin`; then -inf up to a multiple of four
  Shared<T, kThreads> exponentials;  // soft margin: exp((near - farthest) / temperature)
  Shared<int, kWarps> found;
};

// The next positives of an anchor, ascending, from candidate `from` on. Returns how many, 0 at the end.
template <typename In, typename T>
__device__ int gather_positives(const Batch<In>& batch, int anchor, const T* distances, T margin, int& from,
                                Circle<T>& circle) {
  const int t = int(threadIdx.x), warp = t / 32;
  const int64_t label = batch.labels[anchor];
  int gathered = 0;
  for (; from < batch.candidates; from += kThreads) {
    const int j = from + t;
    const bool positive = j < batch.candidates && j != anchor && batch.labels[j] == label;
    const unsigned votes = __ballot_sync(kAllLanes, positive);
    if (lane() == 0) circle.found.set(warp, __popc(votes));
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int found = circle.found.get(w);
      before += w < warp ? found : 0;
      all += found;
    }
    if (gathered + all > kThreads) break;  // left to the next time
    const int place = gathered + before + __popc(votes & ((1u << lane()) - 1));
    if (positive) {
      circle.rows.set(place, j);
      circle.near.set(place, distances[j] + margin);
    }
    gathered += all;
    __syncthreads();
  }
  if (t >= gathered && t < (gathered + 3) / 4 * 4) circle.near.set(t, T(-INFINITY));
  __syncthreads();
  return gathered;
}

// Fills `exponentials` and returns the distance of the farthest positive.
template <typename T>
__device__ T exponentiate(Circle<T>& circle, int positives, T rate) {
  T farthest = -INFINITY;
  for (int p = 0; p < positives; p += 4) {
    T near[4];
    circle.near.get_four(p, near);
#pragma unroll
    for (int k = 0; k < 4; ++k) farthest = near[k] > farthest ? near[k] : farthest;
  }
  const int t = int(threadIdx.x);
  if (t < (positives + 3) / 4 * 4) circle.exponentials.set(t, exp((circle.near.get(t) - farthest) * rate));
  __syncthreads();
  return farthest;
}

// Shows the negatives of an anchor, kFar to a thread, next to some positives: visit(positives, farthest, begin, far)
// with the distances `far` of candidates begin + c * kThreads + thread, NaN where that is no negative, and with a soft
// margin the distance of the farthest positive. When all have been shown, done(positives).
template <typename In, typename T, typename Visit, typename Done>
__device__ void walk(const Batch<In>& batch, const Settings& settings, int anchor, const T* distances,
                     Circle<T>& circle, Visit visit, Done done) {
  const int64_t label = batch.labels[anchor];
  const T margin = settings.soft_margin ? T(0) : T(settings.margin);
  for (int from = 0, positives; (positives = gather_positives(batch, anchor, distances, margin, from, circle));) {
    const T farthest = settings.soft_margin ? exponentiate(circle, positives, T(1 / settings.temperature)) : T(0);
    for (int begin = 0; begin < batch.candidates; begin += kFar * kThreads) {
      T far[kFar];
#pragma unroll
      for (int c = 0; c < kFar; ++c) {
        const int j = begin + c * kThreads + int(threadIdx.x);
        far[c] = j < batch.candidates && batch.labels[j] != label ? distances[j] : T(NAN);
      }
      visit(positives, farthest, begin, far);
    }
    __syncthreads();
    done(positives);
  }
}

// f(values, c) for each four of the positives' values and each negative c, after which done(p).
template <typename T, typename F, typename Done>
__device__ void for_fours(Shared<T, kThreads>& values, int positives, F f, Done done) {
#pragma unroll 1
  for (int p = 0; p < positives; p += 4) {
    T four[4];
    values.get_four(p, four);
#pragma unroll
    for (int c = 0; c < kFar; ++c) f(four, c);
    done(p);
  }
}

// The soft margin where no gap is above kMost temperatures: x = exp(gap / temperature) is a product of an exponential
// of the positive's distance and one of the negative's, a sum of losses log(1 + x) is the logarithm of a product, and
// four slopes x / (1 + x) share a division.
template <typename T>
struct SoftProducts {
  static constexpr T kMost = sizeof(T) == 4 ? 21 : 170;  // exp(4 kMost) is still a normal number, and its inverse

  T rate, largest, far[kFar];  // 1 / temperature; of the thread's gaps / temperature; exponentials, 0 for no negative
  bool apply;                  // in all of the warp

  __device__ SoftProducts(const Settings& settings, T farthest, const T (&distances)[kFar])
      : rate(T(1 / settings.temperature)), largest(0) {
    bool inside = rate < T(INFINITY);
#pragma unroll
    for (int c = 0; c < kFar; ++c) {
      const T x = (farthest - distances[c]) * rate;
      const bool negative = distances[c] == distances[c];
      inside = inside && (!negative || x <= kMost);  // not if NaN
      largest = x > largest ? x : largest;
      far[c] = negative ? exp(x) : T(0);
    }
    apply = __ballot_sync(kAllLanes, inside) == kAllLanes;
  }

  // how many products of four factors fit into a number: 1, 2, 4 or 8
  __device__ int run() const {
    int fit = kFar;
    while (fit > 1 && T(fit) * (largest + T(0.7)) > kMost) fit /= 2;
    return fit;
  }

  // the product of four 1 + x, less 1, so that small x keep their digits
  __device__ T product(const T (&near)[4], int c) const {
    T x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = near[k] * far[c];
    const T less = fma(x[1], x[0] + 1, x[0]), rest = fma(x[3], x[2] + 1, x[2]);
    return fma(rest, less + 1, less);
  }

  // by the gaps
  __device__ void slopes(const T (&near)[4], int c, T (&slope)[4]) const {
    T x[4], factor[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[k] = near[k] * far[c];
      factor[k] = x[k] + 1;
    }
    const T first = factor[0] * factor[1], second = factor[2] * factor[3], inverse = rate * reciprocal(first * second);
    const T of_first = inverse * second, of_second = inverse * first;
    slope[0] = x[0] * (factor[1] * of_first);
    slope[1] = x[1] * (factor[0] * of_first);
    slope[2] = x[2] * (factor[3] * of_second);
    slope[3] = x[3] * (factor[2] * of_second);
  }
};

// Summed loss of an anchor's triplets, and how many of them a mean is taken over. One block an anchor.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    sum_triplets(Batch<In> batch, Settings settings, Prepared<T> prepared, Round<T> round, Outputs<T> out) {
  __shared__ Circle<T> circle;
  __shared__ Shared<Total, kThreads> totals;
  const int anchor = round.first + int(blockIdx.x);
  Total total{0, 0};
  const auto visit = [&](int positives, T farthest, int, const T(&far)[kFar]) {
    T sum[kFar] = {};
    int count[kFar] = {};
    if (settings.soft_margin) {
      const SoftProducts<T> soft(settings, farthest, far);
      if (soft.apply) {
        const int last = soft.run() - 1;
        T product = 0;  // less 1
        const auto multiply = [&](const T(&near)[4], int c) {
          const T more = soft.product(near, c);
          product = fma(product, more + 1, more);
          if ((c & last) != last) return;
          total.sum += double(log1p(product));
          product = 0;
        };
        for_fours(circle.exponentials, positives, multiply, [](int) {});
      } else {
        const auto add = [&](const T(&near)[4], int c) {
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[c] += cost(near[k] - far[c], settings);
        };
        for_fours(circle.near, positives, add, [](int) {});
      }
    } else {
      const auto add = [&](const T(&near)[4], int c) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const T loss = near[k] - far[c];
          if (loss <= 0) continue;  // NaN stays
          sum[c] += loss;
          ++count[c];
        }
      };
      for_fours(circle.near, positives, add, [](int) {});
    }
#pragma unroll
    for (int c = 0; c < kFar; ++c) {
      if (far[c] != far[c]) continue;
      total.sum += double(sum[c]);
      total.count += settings.soft_margin ? positives : count[c];
    }
  };
  walk(batch, settings, anchor, static_cast<const T*>(round.distances + round.at(anchor, batch.candidates)), circle,
       visit, [](int) {});
  total = total_of_block(total, totals);
  const bool finite = !(flags_of_all(prepared) & kNotFinite);
  if (threadIdx.x == 0) {
    if (!finite) total.sum = NAN;
    if (out.losses) out.losses[anchor] = T(total.sum);
    if (out.positive) out.positive[anchor] = -1;
    if (out.negative) out.negative[anchor] = -1;
  }
  reduce(total, anchor, batch.anchors, settings.reduction, finite, out, totals);
}

// ----------------------------------------------------------------------------------------------------------- gradients

// Sums of four values over a warp: lane l gets that of value l % 4.
template <typename T>
__device__ T sums_of_warp(const T (&x)[4]) {
  const bool upper = lane() & 2, odd = lane() & 1;
  const T even = (upper ? x[2] : x[0]) + __shfl_xor_sync(kAllLanes, upper ? x[0] : x[2], 2);
  const T next = (upper ? x[3] : x[1]) + __shfl_xor_sync(kAllLanes, upper ? x[1] : x[3], 2);
  T sum = (odd ? next : even) + __shfl_xor_sync(kAllLanes, odd ? even : next, 1);
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  return sum;
}

// The factors of an anchor's pairs from its distances. One block an anchor.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    weigh_triplets(Batch<In> batch, Settings settings, Upstream<T> up, Round<T> round) {
  __shared__ Circle<T> circle;
  __shared__ Shared<T, kWarps * kThreads> slopes;  // (warp, positive)
  const int t = int(threadIdx.x), warp = t / 32, anchor = round.first + int(blockIdx.x);
  const T weight = up.weight(anchor, settings.reduction);
  const T* distances = round.distances + round.at(anchor, batch.candidates);
  T* factors = round.factors + round.at(anchor, batch.candidates);
  for (int i = t; blockIdx.x == 0 && i < tiles_of_sums(kAnchorsAtOnce, batch.width); i += kThreads) round.ended[i] = 0;
  for (int j = t; j < batch.candidates; j += kThreads) factors[j] = 0;
  const auto visit = [&](int positives, T farthest, int begin, const T(&far)[kFar]) {
    T away[kFar] = {}, toward[4] = {};
    const auto add = [&](T slope, int k, int c) {
      away[c] += slope;
      toward[k] += slope;
    };
    const auto done = [&](int p) {
      const T sum = sums_of_warp(toward);
      const int at = warp * kThreads + p + lane();
      if (lane() < 4) slopes.set(at, begin == 0 ? sum : slopes.get(at) + sum);
#pragma unroll
      for (T& slope : toward) slope = 0;
    };
    const auto add_fours = [&](const auto& slope_of) {
      const auto add_four = [&](const T(&near)[4], int c) {
#pragma unroll
        for (int k = 0; k < 4; ++k) add(slope_of(near[k], far[c]), k, c);
      };
      for_fours(circle.near, positives, add_four, done);
    };
    if (!settings.soft_margin) {
      add_fours([](T near, T far) { return near - far > 0 ? T(1) : T(0); });
    } else if (const SoftProducts<T> soft(settings, farthest, far); soft.apply) {
      const auto add_four = [&](const T(&near)[4], int c) {
        T slope[4];
        soft.slopes(near, c, slope);
#pragma unroll
        for (int k = 0; k < 4; ++k) add(slope[k], k, c);
      };
      for_fours(circle.exponentials, positives, add_four, done);
    } else {
      add_fours([&](T near, T far) { return far == far ? cost_slope(near - far, settings) : T(0); });
    }
#pragma unroll
    for (int c = 0; c < kFar; ++c) {
      const int j = begin + c * kThreads + t;  // the distance again, for which no register is left
      if (away[c] != 0) factors[j] += factor_of(settings.distance, -weight * away[c], distances[j]);
    }
  };
  const auto done = [&](int positives) {
    if (t >= positives) return;
    T toward = 0;
    for (int w = 0; w < kWarps; ++w) toward += slopes.get(w * kThreads + t);
    const int j = circle.rows.get(t);
    factors[j] = factor_of(settings.distance, weight * toward, distances[j]);
  };
  walk(batch, settings, anchor, distances, circle, visit, done);
}

}  // namespace triplet::gpu
