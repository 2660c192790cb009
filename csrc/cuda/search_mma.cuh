// The search of search.cuh on tensor cores. For cosine on bfloat16 and float16 rows one product serves: it is exact in
// float32. Other rows are sums of two float16 numbers, x = h + l, and x.y is taken as l.h' + h.l' + h.h': what is left
// out is below the rounding of float32. The small products come first, since tensor cores cut off digits of what they
// add to a larger sum (Ootomo and Yokota 2022, doi:10.1177/10943420221090256, for the split).
#pragma once

#include "cuda/search.cuh"

namespace triplet::gpu {

// A thread's share of a tile, as SimtShare has it: a warp has 32 rows and 64 columns of the tile, in pieces of 16 x 8;
// 4 x 2 warps.
template <bool kOnlyCosine>
struct MmaShare {
  static constexpr int kTile = 128, kRows = 4, kColumns = 16;
  static constexpr bool kCosine = kOnlyCosine;
  static constexpr int kRowLanes = 3, kColumnLanes = 28, kRowParts = 2, kColumnParts = 4;
  __device__ static int row(int i) { return int(threadIdx.x) / 64 * 32 + i * 8 + lane() / 4; }
  __device__ static int column(int j) { return int(threadIdx.x) / 32 % 2 * 64 + j / 2 * 8 + lane() % 4 * 2 + j % 2; }
  __device__ static int row_part() { return int(threadIdx.x) / 32 % 2; }
  __device__ static int column_part() { return int(threadIdx.x) / 64; }
};

constexpr int kBlocks = 8, kSlot = kBlocks * 128;  // of a tile's side: blocks of 16 rows, and words of 16 columns

// Two buffers, each of two slots of the tile's rows and two of its columns.
using Stages = Shared<uint32_t, 2 * 4 * kSlot>;

// product += the two slots of the rows times those of the columns: the first by the first and the second by the second
// or, crossed, each by the other. In a warp.
template <bool kCrossed, bool kBfloat16>
__device__ void multiply_mma(Stages& stages, int buffer, float (&product)[4][16]) {
  const int row_block = int(threadIdx.x) / 64 * 2, column_block = int(threadIdx.x) / 32 % 2 * 4;
  const auto at = [&](int slot, int block) { return (buffer * 4 + slot) * kSlot + block * 128 + lane() * 4; };
  uint32_t left[2][2][4];
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
#pragma unroll
    for (int m = 0; m < 2; ++m) stages.get_four(at(slot, row_block + m), left[slot][m]);
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    uint32_t right[2][2];
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {  // a block of 16 columns is two second operands
      uint32_t four[4];
      stages.get_four(at(2 + slot, column_block + n / 2), four);
      right[slot][0] = four[n % 2];
      right[slot][1] = four[n % 2 + 2];
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float (&top)[16] = product[2 * m], (&bottom)[16] = product[2 * m + 1];
      float acc[4] = {top[2 * n], top[2 * n + 1], bottom[2 * n], bottom[2 * n + 1]};
      mma_16x8x16<kBfloat16>(acc, left[0][m], right[kCrossed]);
      mma_16x8x16<kBfloat16>(acc, left[1][m], right[!kCrossed]);
      top[2 * n] = acc[0];
      top[2 * n + 1] = acc[1];
      bottom[2 * n] = acc[2];
      bottom[2 * n + 1] = acc[3];
    }
  }
}

// The products of a tile, the next stage's rows on their way while this one's are multiplied. Of the batch the values
// are not used. `rests`: what products are to be multiplied by.
template <Numbers kNumbers, typename In>
__device__ void multiply_tile_mma(const Batch<In>& batch, const Panels& panels, const Place& at, Stages& stages,
                                  Shared<float, 256>& rests, float (&product)[4][16]) {
  constexpr bool kSplit = kNumbers == Numbers::split, kBfloat16 = kNumbers == Numbers::bfloat16;
  using Share = MmaShare<false>;
  constexpr int kTile = Share::kTile;
  const int t = int(threadIdx.x);
  rests.set(t, panels.rests[t < kTile ? at.row(t) : at.column(t - kTile)]);
  const int crossed = kSplit ? (batch.width + 15) / 16 : 0, all = crossed + panels.steps / 2;
  // each thread copies 16 bytes of a block of rows and of one of columns for each slot
  const int column = at.columns < batch.anchors ? at.columns / 16 : panels.own + (at.columns - batch.anchors) / 16;
  const int64_t row_at = panels.at(at.rows / 16 + t / 32, 0) + lane() * 4;
  const int64_t column_at = panels.at(column + t / 32, 0) + lane() * 4;
  const auto copy = [&](int stage) {
    const bool first = stage < crossed;
    const int step = first ? stage : (stage - crossed) * 2, to = stage % 2 * 4 * kSlot + t * 4;
    const uint32_t* high = panels.high + step * 128;
    const uint32_t* second = first ? panels.low + step * 128 : high + 128;
    stages.copy_four(to, high + row_at);
    stages.copy_four(to + kSlot, second + row_at);
    stages.copy_four(to + 2 * kSlot, high + column_at);
    stages.copy_four(to + 3 * kSlot, second + column_at);
  };
  copy(0);
#pragma unroll 1
  for (int stage = 0; stage < all; ++stage) {
    wait_for_copies();
    __syncthreads();  // one barrier a stage: the other buffer was read before it
    if (stage + 1 < all) copy(stage + 1);
    if (stage < crossed) {
      multiply_mma<true, kBfloat16>(stages, stage % 2, product);
    } else {
      multiply_mma<false, kBfloat16>(stages, stage % 2, product);
    }
  }
#pragma unroll
  for (int i = 0; i < Share::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Share::kColumns; ++j) {
      product[i][j] *= rests.get(Share::row(i)) * rests.get(kTile + Share::column(j));
    }
  }
}

// One tile a block, as `search_pairs`.
template <Numbers kNumbers, bool kBeyond>
__global__ void __launch_bounds__(kThreads, 2)
    search_pairs_mma(Batch<float> batch, Prepared<float> prepared, Panels panels, Winners winners, Pass pass) {
  using Share = MmaShare<kNumbers != Numbers::split>;
  constexpr int kTile = Share::kTile;
  __shared__ Stages stages;
  __shared__ Ends<float, kTile> ends;
  __shared__ Shared<float, 2 * kTile> rests;
  __shared__ Tops<Share> tops;
  const Place at = place<kTile>(batch);
  if (!load_ends<kBeyond>(batch, prepared, winners, at, pass, ends)) return;
  float product[Share::kRows][Share::kColumns] = {};
  multiply_tile_mma<kNumbers>(batch, panels, at, stages, rests, product);
  search_tile<Share, kBeyond>(product, pass, winners, ends, tops);
}

}  // namespace triplet::gpu
