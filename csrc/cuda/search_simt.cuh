// The search of search.cuh in the arithmetic of each type, without tensor cores.
#pragma once

#include "cuda/search.cuh"

namespace triplet::gpu {

template <typename In>
struct alignas(sizeof(In) * 4 < 16 ? sizeof(In) * 4 : 16) FourOf {
  In at[4];
};

// Four values of row j from column d on, 0 beyond the end.
template <typename In>
__device__ FourOf<In> load_raw(const Batch<In>& batch, int j, int d) {
  FourOf<In> four{};
  if (d >= batch.width) return four;
  const In* x = batch.row(j) + d;
  if (batch.vectors) return *reinterpret_cast<const FourOf<In>*>(x);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (d + c < batch.width) four.at[c] = x[c];
  }
  return four;
}

// The same as the search sees them.
template <typename In, typename T>
__device__ void load_four(const Batch<In>& batch, const Prepared<T>& prepared, int j, int d, T (&out)[4]) {
  const FourOf<In> four = load_raw(batch, j, d);
  const FourOf<T> shift = d < batch.width ? *reinterpret_cast<const FourOf<T>*>(prepared.shift + d) : FourOf<T>{};
  const T scale = prepared.scale[j];
#pragma unroll
  for (int c = 0; c < 4; ++c) out[c] = fma(T(widen(four.at[c])), scale, -shift.at[c]);
}

// Depth of a step through the columns: every thread loads four values of the rows' tile and four of the columns'.
template <int kSide>
constexpr int kDepth = 64 / kSide;

template <int kSide>
constexpr int kPitch = 16 * kSide + 4;  // of a column in shared memory; 4: aligned vectors, half the bank conflicts

template <typename T, int kSide>
using Panel = Shared<T, 2 * kDepth<kSide> * kPitch<kSide>>;  // two buffers, (depth, pitch) each

template <int kSide, typename T>
__device__ void store_four(Panel<T, kSide>& panel, int buffer, const T (&values)[4]) {
  constexpr int kVectors = kDepth<kSide> / 4;  // of a row
  const int row = int(threadIdx.x) / kVectors, d = int(threadIdx.x) % kVectors * 4;
#pragma unroll
  for (int c = 0; c < 4; ++c) panel.set((buffer * kDepth<kSide> + d + c) * kPitch<kSide> + row, values[c]);
}

// product += x.y over one step
template <int kSide, typename T>
__device__ void multiply(Panel<T, kSide>& x, Panel<T, kSide>& y, int buffer, T (&product)[kSide][kSide]) {
  using Share = SimtShare<kSide>;
#pragma unroll
  for (int d = 0; d < kDepth<kSide>; ++d) {
    T right[kSide / 4][4];
    const int at = (buffer * kDepth<kSide> + d) * kPitch<kSide>;
#pragma unroll
    for (int g = 0; g < kSide / 4; ++g) y.get_four(at + Share::column(4 * g), right[g]);
#pragma unroll
    for (int g = 0; g < kSide / 4; ++g) {  // not all rows at once, which takes more registers than there are
      T left[4];
      x.get_four(at + Share::row(4 * g), left);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          T& sum = product[4 * g + i][j];
          sum = fma(left[i], right[j / 4][j % 4], sum);
        }
      }
    }
  }
}

// The products of a tile, the next step's values on their way from memory while this step's are multiplied.
template <int kSide, typename In, typename T>
__device__ void multiply_tile(const Batch<In>& batch, const Prepared<T>& prepared, Shared<Place, 1>& place,
                              Panel<T, kSide>& x, Panel<T, kSide>& y, T (&product)[kSide][kSide]) {
  constexpr int kStep = kDepth<kSide>;
  T next_x[4], next_y[4];
  const auto load = [&](int begin) {
    const Place at = place.get(0);
    const int offset = int(threadIdx.x) / (kStep / 4), d = int(threadIdx.x) % (kStep / 4) * 4;
    load_four(batch, prepared, at.row(offset), begin + d, next_x);
    load_four(batch, prepared, at.column(offset), begin + d, next_y);
  };
  load(0);
  for (int begin = 0; begin < batch.width; begin += kStep) {
    const int buffer = begin / kStep % 2;
    store_four<kSide>(x, buffer, next_x);
    store_four<kSide>(y, buffer, next_y);
    __syncthreads();  // one barrier a step: the other buffer was read before it
    if (begin + kStep < batch.width) load(begin + kStep);
    multiply<kSide>(x, y, buffer, product);
  }
}

// One tile a block.
template <typename In, typename T, int kSide, bool kBeyond>
__global__ void __launch_bounds__(kThreads, 2)
    search_pairs(Batch<In> batch, Prepared<T> prepared, Winners winners, Pass pass) {
  using Share = SimtShare<kSide>;
  constexpr int kTile = Share::kTile;
  __shared__ Panel<T, kSide> x, y;
  __shared__ Ends<T, kTile> ends;
  __shared__ Tops<Share> tops;
  if (!load_ends<kBeyond>(batch, prepared, winners, place<kTile>(batch), pass, ends)) return;
  T product[kSide][kSide] = {};
  multiply_tile(batch, prepared, ends.place, x, y, product);
  search_tile<Share, kBeyond>(product, pass, winners, ends, tops);
}

}  // namespace triplet::gpu
