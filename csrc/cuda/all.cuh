// The loss of all triplets and its gradients, on CUDA. A block takes an anchor: the distances of some of its positives,
// then those of its negatives, chunk by chunk, and the cost of each pair of the two. Nothing of size (B, B) is held:
// the backward pass weighs the pairs of kAnchorsAtOnce anchors at a time.
#pragma once

#include "cuda/common.cuh"

namespace triplet::gpu {

constexpr int kAnchorsAtOnce = 512;

// A block's shared memory: distances of up to kThreads positives and of kThreads candidates.
template <typename T>
struct Circle {
  Shared<int, kThreads> rows;  // of the positives
  Shared<T, kThreads> near;    // (positives,)
  Shared<T, kThreads> far;     // (candidates,), NaN: not a negative
  Shared<int, kWarps> found;
};

// The next positives of an anchor, ascending, from candidate `from` on, up to kThreads. Returns how many, 0 at the end.
template <typename In, typename T>
__device__ int gather_positives(const Batch<In>& batch, int anchor, int& from, Circle<T>& circle) {
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
    if (positive) circle.rows.set(gathered + before + __popc(votes & ((1u << lane()) - 1)), j);
    gathered += all;
    __syncthreads();
  }
  return gathered;
}

// Shows each candidate j, one to a thread, next to some positives: visit(positives, j, far) with the distance `far` of
// a negative, NaN for others; circle.near holds the distances of the positives. When all have been shown,
// done(positives).
template <typename In, typename T, typename Visit, typename Done>
__device__ void walk(const Batch<In>& batch, Distance distance, const T* scale, int anchor, Circle<T>& circle,
                     Visit visit, Done done) {
  const int t = int(threadIdx.x), warp = t / 32;
  const int64_t label = batch.labels[anchor];
  for (int from = 0, positives; (positives = gather_positives(batch, anchor, from, circle));) {
    for (int p = warp; p < positives; p += kWarps) {
      const T near = measure_pair(batch, distance, scale, anchor, circle.rows.get(p)).distance;
      if (lane() == 0) circle.near.set(p, near);
    }
    for (int begin = 0; begin < batch.candidates; begin += kThreads) {
      for (int k = warp; k < kThreads; k += kWarps) {
        const int j = begin + k;
        T far = T(NAN);
        if (j < batch.candidates && batch.labels[j] != label) {
          far = measure_pair(batch, distance, scale, anchor, j).distance;
        }
        if (lane() == 0) circle.far.set(k, far);
      }
      __syncthreads();
      visit(positives, begin + t, circle.far.get(t));
      __syncthreads();
    }
    done(positives);
  }
}

// Summed loss of an anchor's triplets, and how many of them a mean is taken over. One block an anchor.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads)
    sum_triplets(Batch<In> batch, Settings settings, Prepared<T> prepared, Outputs<T> out) {
  __shared__ Circle<T> circle;
  __shared__ Shared<Total, kThreads> totals;
  const int anchor = int(blockIdx.x);
  Total total{0, 0};
  const auto visit = [&](int positives, int, T far) {
    if (far != far) return;
    T sum = 0;
    int count = 0;
    for (int p = 0; p < positives; ++p) {
      const T loss = cost(circle.near.get(p) - far, settings);
      sum += loss;
      count += settings.soft_margin || loss > 0;
    }
    total.sum += double(sum);
    total.count += count;
  };
  walk(batch, settings.distance, static_cast<const T*>(prepared.scale), anchor, circle, visit, [](int) {});
  total = total_of_block(total, totals);
  const bool finite = !(flags_of_all(prepared) & kNotFinite);
  if (threadIdx.x == 0) {
    if (!finite) total.sum = NAN;
    if (out.losses) out.losses[anchor] = T(total.sum);
    if (out.positive) out.positive[anchor] = -1;
    if (out.negative) out.negative[anchor] = -1;
  }
  reduce(total, settings.reduction, finite, out, totals);
}

// ------------------------------------------------------------------------------------------------------------
// gradients

// The factor of each candidate's direction in the gradient of an anchor's loss: a row of factors (anchors, candidates)
// for the anchors from `first` on. One block an anchor.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads)
    weigh_triplets(Batch<In> batch, Settings settings, const T* scale, Upstream<T> up, int first, T* factors) {
  __shared__ Circle<T> circle;
  __shared__ Shared<T, kWarps * kThreads> slopes;  // (warp, positive)
  const int t = int(threadIdx.x), warp = t / 32, anchor = first + int(blockIdx.x);
  const Distance distance = settings.distance;
  const T weight = up.weight(anchor, settings.reduction);
  T* own = factors + int64_t(blockIdx.x) * batch.candidates;
  for (int j = t; j < batch.candidates; j += kThreads) own[j] = 0;
  const auto visit = [&](int positives, int j, T far) {
    const bool negative = far == far;
    T away = 0;
    for (int p = 0; p < positives; ++p) {
      const T slope = negative ? cost_slope(circle.near.get(p) - far, settings) : T(0);
      const T toward = sum_of_warp(slope);
      const int at = warp * kThreads + p;
      if (lane() == 0) slopes.set(at, j < kThreads ? toward : slopes.get(at) + toward);
      away += slope;
    }
    if (negative) own[j] += factor_of(distance, -weight * away, far);
  };
  const auto done = [&](int positives) {
    if (t >= positives) return;
    T toward = 0;
    for (int w = 0; w < kWarps; ++w) toward += slopes.get(w * kThreads + t);
    own[circle.rows.get(t)] = factor_of(distance, weight * toward, circle.near.get(t));
  };
  walk(batch, distance, scale, anchor, circle, visit, done);
}

// sums += what the pairs of `anchors` anchors from `first` on, of these factors, pull at a row: differences of rows,
// for cosine directions that finish_gradient makes orthogonal. One block a row; sums (gradient_rows, width).
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads)
    pull_rows(Batch<In> batch, Distance distance, const T* scale, const T* factors, int first, int anchors, T* sums) {
  __shared__ Shared<T, kWarps * kStripWidth> parts;
  const int row = int(blockIdx.x), warp = int(threadIdx.x) / 32;
  const bool cosine = distance == Distance::cosine, is_anchor = row >= first && row < first + anchors;
  const auto pull = [&](T factor, int other, int begin, T(&sum)[kStrip]) {
    if (factor == 0) return;
    const T y_scale = cosine ? scale[other] : T(1);
#pragma unroll
    for (int c = 0; c < kStrip; ++c) {
      const int d = begin + c * 32 + lane();
      if (d >= batch.width) continue;
      const T x = cosine ? T(0) : T(widen(batch.row(row)[d])), y = T(widen(batch.row(other)[d])) * y_scale;
      sum[c] = fma(factor, x - y, sum[c]);
    }
  };
  const auto add = [&](int begin, T(&sum)[kStrip]) {
    for (int a = warp; a < anchors; a += kWarps) {
      pull(factors[int64_t(a) * batch.candidates + row], first + a, begin, sum);
    }
    for (int j = warp; is_anchor && j < batch.candidates; j += kWarps) {
      pull(factors[int64_t(row - first) * batch.candidates + j], j, begin, sum);
    }
  };
  T* own = sums + int64_t(row) * batch.width;
  sum_row<T>(batch.width, parts, add, [&](int d, T sum) { own[d] = first == 0 ? sum : own[d] + sum; });
}

// The gradient of a row from its sum. For cosine, d(1 - cos)/dx = (cos x/|x| - y/|y|) / |x|: the directions' part along
// x falls away, unless |x| is clamped and so a constant. One warp a row.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads)
    finish_gradient(Batch<In> batch, Distance distance, const T* scale, const int64_t* count, const T* sums,
                    In* gradients, int gradient_rows) {
  const int row = warp_row();
  if (row >= gradient_rows) return;
  In* gradient = gradients + int64_t(row) * batch.width;
  const In* x = batch.row(row);
  const T* sum = sums + int64_t(row) * batch.width;
  const bool cosine = distance == Distance::cosine, sound = *count >= 0;
  const T x_scale = cosine ? scale[row] : T(1);
  T along = 0;
  if (cosine && x_scale < T(1e12)) {
    for (int d = lane(); d < batch.width; d += 32) along = fma(sum[d], T(widen(x[d])) * x_scale, along);
    along = sum_of_warp(along);
  }
  for (int d = lane(); d < batch.width; d += 32) {
    narrow(sound ? (sum[d] - along * (T(widen(x[d])) * x_scale)) * x_scale : T(NAN), gradient[d]);
  }
}

}  // namespace triplet::gpu
