// All triplets, on CUDA, for kAnchorsAtOnce anchors at a time: their distances to all candidates, by the products of
// search_simt.cuh and search_mma.cuh. Then triplets.cuh, and backward pull.cuh.
#pragma once

#include "cuda/search_mma.cuh"
#include "cuda/search_simt.cuh"

namespace triplet::gpu {

constexpr int kAnchorsAtOnce = 512, kPullTile = 64, kSlice = kAnchorsAtOnce;

// The anchors [first, first + anchors), and memory for them.
template <typename T>
struct Round {
  int first, anchors;
  T* distances;  // (anchors, candidates)
  // of the backward pass
  T* factors;  // (anchors, candidates) of each pair's difference of rows, cosine: direction
  T* sums;     // (gradient_rows, width)
  T* parts;    // (slices, kAnchorsAtOnce, width) of the anchors' sums
  int* ended;  // (tiles of the anchors' sums,) slices that are there

  __device__ int end() const { return first + anchors; }
  __device__ int64_t at(int anchor, int candidates) const { return int64_t(anchor - first) * candidates; }
};

// Slices of up to kSlice pairs of an anchor's sum: those that it has as a candidate of the round's anchors; then, of
// its own, those of each kSlice candidates.
__host__ __device__ inline int slices_of(int candidates) { return 1 + (candidates + kSlice - 1) / kSlice; }
__host__ __device__ inline int64_t tiles_of_sums(int rows, int width) {
  return int64_t((rows + kPullTile - 1) / kPullTile) * ((width + kPullTile - 1) / kPullTile);
}

// Squared distances below this share of |x|^2 + |y|^2, of rows as the search sees them, are summed up from differences.
// Others come from products, whose rounding moves them by Rounding.share of |x|^2 + |y|^2 at most: 64 times that share
// of the squared distance itself.
constexpr float kNear = 1.f / 64;

// Tile b of the round's anchors and all candidates, column by column of tiles; the others begin a column.
template <int kTile, typename In, typename T>
__device__ Place place_of(const Batch<In>& batch, const Round<T>& round) {
  const int tall = (round.anchors + kTile - 1) / kTile, own = (batch.anchors + kTile - 1) / kTile;
  const int row = round.first + int(blockIdx.x) % tall * kTile, j = int(blockIdx.x) / tall;
  if (j < own) return {row, round.end(), j * kTile, batch.anchors};
  return {row, round.end(), batch.anchors + (j - own) * kTile, batch.candidates};
}

template <typename T, int kTile>
__device__ void load_norms(const Prepared<T>& prepared, const Place& at, Shared<T, 2 * kTile>& norms) {
  const int t = int(threadIdx.x);
  if (t < 2 * kTile) norms.set(t, prepared.norms[t < kTile ? at.row(t) : at.column(t - kTile)]);
}

// The distances of a tile from its products. Where overflow or NaN spoils these, so that no comparison holds, and
// where a warp finds rows near each other, by differences, a pair at a time.
template <typename Share, typename In, typename T>
__device__ void store_distances(const Batch<In>& batch, Distance distance, const Prepared<T>& prepared,
                                const Round<T>& round, const Place& at, Shared<T, 2 * Share::kTile>& norms,
                                const T (&product)[Share::kRows][Share::kColumns]) {
  const bool cosine = distance == Distance::cosine;
  const T unit = cosine ? T(1) : 1 / prepared.scale[0];
  uint64_t near = 0;
#pragma unroll
  for (int i = 0; i < Share::kRows; ++i) {
    const int row = at.rows + Share::row(i);
    T* own = round.distances + round.at(row, batch.candidates) + at.columns;
#pragma unroll
    for (int j = 0; j < Share::kColumns; ++j) {
      const int column = Share::column(j);
      if (row >= at.row_end || at.columns + column >= at.column_end) continue;
      const T length = norms.get(Share::row(i)) + norms.get(Share::kTile + column);
      const T squared = fma(T(-2), product[i][j], length);
      const bool far = cosine || squared > T(kNear) * length + T(1e-30);  // below that, numbers may be denormal
      if (!far) near |= uint64_t(1) << (i * Share::kColumns + j);
      const T apart = distance == Distance::euclidean ? sqrt(squared) * unit : squared * unit * unit;
      own[column] = cosine ? 1 - product[i][j] : apart;
    }
  }
  for (unsigned lanes; (lanes = __ballot_sync(kAllLanes, near != 0));) {
    const int source = __ffsll(int64_t(lanes)) - 1, bit = __ffsll(int64_t(near)) - 1;
    const int row = __shfl_sync(kAllLanes, Share::row(bit / Share::kColumns), source) + at.rows;
    const int column = __shfl_sync(kAllLanes, Share::column(bit % Share::kColumns), source) + at.columns;
    const T apart = measure_pair(batch, distance, prepared.scale, row, column, unit).distance;
    if (lane() != source) continue;
    round.distances[round.at(row, batch.candidates) + column] = apart;
    near &= near - 1;
  }
}

// One tile a block.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    measure_pairs(Batch<In> batch, Distance distance, Prepared<T> prepared, Round<T> round) {
  using Share = SimtShare<4>;
  constexpr int kTile = Share::kTile;
  __shared__ Panel<T, 4> x, y;
  __shared__ Shared<T, 2 * kTile> norms;
  __shared__ Shared<Place, 1> place;
  const Place at = place_of<kTile>(batch, round);
  if (threadIdx.x == 0) place.set(0, at);
  load_norms<T, kTile>(prepared, at, norms);
  __syncthreads();
  T product[Share::kRows][Share::kColumns] = {};
  multiply_tile(batch, prepared, place, x, y, product);
  store_distances<Share>(batch, distance, prepared, round, at, norms, product);
}

// The same on tensor cores.
template <Numbers kNumbers, typename In>
__global__ void __launch_bounds__(kThreads, 2)
    measure_pairs_mma(Batch<In> batch, Distance distance, Prepared<float> prepared, Panels panels, Round<float> round) {
  using Share = MmaShare<false>;
  constexpr int kTile = Share::kTile;
  __shared__ Stages stages;
  __shared__ Shared<float, 2 * kTile> norms, rests;
  const Place at = place_of<kTile>(batch, round);
  load_norms<float, kTile>(prepared, at, norms);
  float product[Share::kRows][Share::kColumns] = {};
  multiply_tile_mma<kNumbers>(batch, panels, at, stages, rests, product);  // has barriers
  store_distances<Share>(batch, distance, prepared, round, at, norms, product);
}

}  // namespace triplet::gpu
