// The gradients of all triplets: sums of the rows' differences, by the factors that triplets.cuh leaves, in tiles.
#pragma once

#include "cuda/triplets.cuh"

namespace triplet::gpu {

// A block's part of the sums: rows [row, row_end) and columns from `column` on, of their pairs with rows [from, from +
// count). Slice 0: of the round's anchors with these rows; else of these rows, anchors, with candidates.
struct Part {
  int row, row_end, column, slice, from, count;
};

template <typename In, typename T>
__device__ Part part_of(const Batch<In>& batch, const Round<T>& round, int gradient_rows) {
  const int across = (batch.width + kPullTile - 1) / kPullTile, tile = int(blockIdx.x) / across;
  const int column = int(blockIdx.x) % across * kPullTile;
  const int first = (gradient_rows + kPullTile - 1) / kPullTile, tall = (round.anchors + kPullTile - 1) / kPullTile;
  if (tile < first) return {tile * kPullTile, gradient_rows, column, 0, round.first, round.anchors};
  const int slice = 1 + (tile - first) / tall, from = (slice - 1) * kSlice, left = batch.candidates - from;
  const int row = round.first + (tile - first) % tall * kPullTile;
  return {row, round.end(), column, slice, from, left < kSlice ? left : kSlice};
}

// sums += what the pairs of a round pull at each row: differences of rows, for cosine directions that finish_gradient
// makes orthogonal. One part a block. Rows of the round's anchors have several, which the last block to end adds, in
// their order.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    pull_rows(Batch<In> batch, Distance distance, const T* scale, Round<T> round, int gradient_rows) {
  using Share = SimtShare<4>;
  constexpr int kStep = kDepth<4>, kPitch = gpu::kPitch<4>;
  static_assert(Share::kTile == kPullTile && kAnchorsAtOnce % kPullTile == 0);
  __shared__ Panel<T, 4> x, factors;  // (pair, column), (pair, row)
  const bool cosine = distance == Distance::cosine;
  const int t = int(threadIdx.x);
  const Part part = part_of(batch, round, gradient_rows);
  T next_x[4], next_factors[4], own[4][4] = {}, sum[4][4] = {};
  const auto row_at = [&](int i) { return part.row + Share::row(i); };
  const auto column_at = [&](int c) { return part.column + Share::column(c); };
  const auto for_own = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (row_at(i) < gradient_rows && column_at(c) < batch.width) f(i, c);
      }
    }
  };
  const auto load = [&](int begin) {  // a thread four columns of a row, and four factors
    const int k = begin + t / 16, other = part.from + (k < part.count ? k : 0);
    const FourOf<In> four = load_raw(batch, other, part.column + t % 16 * 4);
    const T y_scale = cosine ? scale[other] : T(1);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      next_x[c] = T(widen(four.at[c])) * y_scale;
      const int pair = part.slice ? begin + t % 4 * 4 + c : k;
      const int row = part.row + (part.slice ? t / 4 : t % 16 * 4 + c);
      const int anchor = part.slice ? row : part.from + pair, candidate = part.slice ? part.from + pair : row;
      const bool inside = pair < part.count && row < part.row_end;
      next_factors[c] = inside ? round.factors[round.at(anchor, batch.candidates) + candidate] : T(0);
    }
  };
  const auto add = [&](int buffer, auto&& difference) {
#pragma unroll
    for (int d = 0; d < kStep; ++d) {
      T right[4], left[4];
      x.get_four(buffer + d * kPitch + Share::column(0), right);
      factors.get_four(buffer + d * kPitch + Share::row(0), left);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[i][c] = fma(left[i], difference(own[i][c], right[c]), sum[i][c]);
      }
    }
  };
  load(0);
  if (!cosine) for_own([&](int i, int c) { own[i][c] = T(widen(batch.row(row_at(i))[column_at(c)])); });
  for (int begin = 0; begin < part.count; begin += kStep) {
    const int buffer = begin / kStep % 2 * kStep * kPitch;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      x.set(buffer + t / 16 * kPitch + t % 16 * 4 + c, next_x[c]);
      factors.set(buffer + (part.slice ? (t % 4 * 4 + c) * kPitch + t / 4 : t / 16 * kPitch + t % 16 * 4 + c),
                  next_factors[c]);
    }
    __syncthreads();  // one barrier a step: the other buffer was read before it
    if (begin + kStep < part.count) load(begin + kStep);
    if (cosine) {
      add(buffer, [](T, T y) { return -y; });
    } else {
      add(buffer, [](T x, T y) { return x - y; });
    }
  }
  if (part.row >= round.first && part.row < round.end()) {
    const auto at = [&](int slice, int i, int c) {
      return (int64_t(slice) * kAnchorsAtOnce + row_at(i) - round.first) * batch.width + column_at(c);
    };
    const int slices = slices_of(batch.candidates), across = (batch.width + kPullTile - 1) / kPullTile;
    int* ended = round.ended + (part.row - round.first) / kPullTile * across + part.column / kPullTile;
    for_own([&](int i, int c) { round.parts[at(part.slice, i, c)] = sum[i][c]; });
    __threadfence();
    __syncthreads();
    if (!__syncthreads_or(t == 0 && atomicAdd(ended, 1) == slices - 1)) return;
    __threadfence();
    for_own([&](int i, int c) {
      sum[i][c] = 0;
      for (int slice = 0; slice < slices; ++slice) sum[i][c] += round.parts[at(slice, i, c)];
    });
  }
  for_own([&](int i, int c) {
    T& out = round.sums[int64_t(row_at(i)) * batch.width + column_at(c)];
    out = round.first == 0 ? sum[i][c] : out + sum[i][c];
  });
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
