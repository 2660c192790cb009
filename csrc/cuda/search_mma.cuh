// The search of search.cuh on tensor cores, for cosine on bfloat16 and float16 rows. A product of two such
// numbers is exact in float32, in which they are added, though with more rounding than by the SIMT kernel (launch.cuh).
#pragma once

#include "cuda/search.cuh"

namespace triplet::gpu {

// A thread's share of a tile, as SimtShare has it: a warp has 32 rows and 64 columns of the tile, in pieces of 16 x 8;
// 4 x 2 warps.
struct MmaShare {
  static constexpr int kTile = 128, kRows = 4, kColumns = 16;
  static constexpr bool kCosine = true;
  static constexpr int kRowLanes = 3, kColumnLanes = 28, kRowParts = 2, kColumnParts = 4;
  __device__ static int row(int i) { return int(threadIdx.x) / 64 * 32 + i * 8 + lane() / 4; }
  __device__ static int column(int j) { return int(threadIdx.x) / 32 % 2 * 64 + j / 2 * 8 + lane() % 4 * 2 + j % 2; }
  __device__ static int row_part() { return int(threadIdx.x) / 32 % 2; }
  __device__ static int column_part() { return int(threadIdx.x) / 64; }
};

constexpr int kMmaDepth = 16, kMmaPitch = kMmaDepth / 2 + 4;  // of a row in shared memory, in pairs; no bank conflicts

using MmaPanel =
    Shared<uint32_t, 2 * MmaShare::kTile * kMmaPitch>;  // two buffers of pairs of values, (rows, pitch) each

// A bfloat16 row can be so long or short that products of its values leave float32: a power of two near 1 / |x| brings
// it near 1, exactly. 1 for float16.
template <typename In>
__device__ inline float power_of_two(float scale) {
  if constexpr (std::is_same_v<In, Float16>) return scale > 0;
  const float power = bits_as<float>(bits_as<uint32_t>(scale) & 0x7f800000u);
  return power > 0 || scale == 0 ? power : 1.17549435e-38f;  // the smallest that is not denormal
}

__device__ inline uint32_t pair_of(uint16_t low, uint16_t high) { return uint32_t(high) << 16 | low; }

// Two neighbours times a power of two.
template <typename In>
__device__ inline uint32_t scaled_pair(In low, In high, float power) {
  if constexpr (std::is_same_v<In, Float16>) return power > 0 ? pair_of(low.bits, high.bits) : 0;
  return bits_as<uint32_t>(widen(low) * power) >> 16 | (bits_as<uint32_t>(widen(high) * power) & 0xffff0000u);
}

// Four values of row j from column d on, as two pairs; 0 beyond the end.
template <typename In>
__device__ void load_pairs(const Batch<In>& batch, float power, int j, int d, uint32_t (&out)[2]) {
  const FourOf<In> four = load_raw(batch, j, d);
  out[0] = scaled_pair(four.at[0], four.at[1], power);
  out[1] = scaled_pair(four.at[2], four.at[3], power);
}

// product += x.y over one step, in a warp
template <typename In>
__device__ void multiply_mma(MmaPanel& x, MmaPanel& y, int buffer,
                             float (&product)[MmaShare::kRows][MmaShare::kColumns]) {
  const int pair = lane() % 4;
  const auto at = [&](int row) { return (buffer * MmaShare::kTile + row) * kMmaPitch + pair; };
  uint32_t left[2][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows 0..7 and 8..15 of a piece
      left[m][half] = x.get(at(MmaShare::row(2 * m + half)));
      left[m][half + 2] = x.get(at(MmaShare::row(2 * m + half)) + 4);
    }
  }
#pragma unroll
  for (int n = 0; n < MmaShare::kColumns / 2; ++n) {
    const int column = MmaShare::column(2 * n) - lane() % 4 * 2 + lane() / 4;
    const uint32_t right[2] = {y.get(at(column)), y.get(at(column) + 4)};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float (&top)[MmaShare::kColumns] = product[2 * m], (&bottom)[MmaShare::kColumns] = product[2 * m + 1];
      float acc[4] = {top[2 * n], top[2 * n + 1], bottom[2 * n], bottom[2 * n + 1]};
      mma_16x8x16<std::is_same_v<In, Bfloat16>>(acc, left[m], right);
      top[2 * n] = acc[0];
      top[2 * n + 1] = acc[1];
      bottom[2 * n] = acc[2];
      bottom[2 * n + 1] = acc[3];
    }
  }
}

// One tile a block, as `search_pairs`.
template <typename In, bool kBeyond>
__global__ void __launch_bounds__(kThreads, 2)
    search_pairs_mma(Batch<In> batch, Prepared<float> prepared, Winners winners, Pass pass) {
  constexpr int kTile = MmaShare::kTile;
  __shared__ MmaPanel x, y;
  __shared__ Ends<float, kTile> ends;
  __shared__ Shared<float, 2 * kTile> rests;  // rest: what the power of two leaves of 1 / |x|
  __shared__ Tops<MmaShare> tops;
  const Place at = place<kTile>(batch);
  if (!load_ends<kBeyond>(batch, prepared, winners, at, pass, ends)) return;
  // a thread loads four values of two rows of each panel
  const int row = int(threadIdx.x) / 4, d = int(threadIdx.x) % 4 * 4;
  float product[MmaShare::kRows][MmaShare::kColumns] = {}, powers[4];
  uint32_t next[4][2];
  const auto place = [&](int k) { return k < 2 ? at.row(row + k * 64) : at.column(row + (k - 2) * 64); };
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float scale = prepared.scale[place(k)];
    powers[k] = power_of_two<In>(scale);
    if (threadIdx.x % 4 == 0) rests.set(row + k * 64, powers[k] > 0 ? scale / powers[k] : 0);
  }
  const auto load = [&](int begin) {
#pragma unroll
    for (int k = 0; k < 4; ++k) load_pairs(batch, powers[k], place(k), begin + d, next[k]);
  };
  load(0);
  for (int begin = 0; begin < batch.width; begin += kMmaDepth) {
    const int buffer = begin / kMmaDepth % 2;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int to = (buffer * kTile + row + k % 2 * 64) * kMmaPitch + d / 2;
      (k < 2 ? x : y).set(to, next[k][0]);
      (k < 2 ? x : y).set(to + 1, next[k][1]);
    }
    __syncthreads();
    if (begin + kMmaDepth < batch.width) load(begin + kMmaDepth);
    multiply_mma<In>(x, y, buffer, product);
  }
#pragma unroll
  for (int i = 0; i < MmaShare::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < MmaShare::kColumns; ++j) {
      product[i][j] *= rests.get(MmaShare::row(i)) * rests.get(kTile + MmaShare::column(j));
    }
  }
  search_tile<MmaShare, kBeyond>(product, pass, winners, ends, tops);
}

}  // namespace triplet::gpu
