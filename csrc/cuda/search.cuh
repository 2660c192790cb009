// The search for the winners: tiles of x.y products, each pair of the anchors' tiles visited once, winners of its rows
// and of its columns kept as keys that atomicMax reduces. Here for every type; search_mma.cuh has tensor cores for
// some.
#pragma once

#include "cuda/common.cuh"

namespace triplet::gpu {

// What a launch looks for. Slots of Winners: 0 farthest positive, 1 a negative, 2 a negative beyond the positive.
struct Pass {
  bool farthest;  // the negative: farthest instead of nearest
  bool beyond;    // the negative: only strictly farther than the winner of slot 0; it goes to slot 2
  bool rows;      // double: the values are known, find the lowest rows that have them

  // of the winning positives (which = 0) and negatives (1)
  __device__ int slot(int which) const { return which && beyond ? 2 : which; }
};

// Tiles [begin, begin + kTile) of anchors and of candidates that this block compares.
struct Place {
  int rows, row_end, columns, column_end;
  bool columns_are_anchors, itself;
};

// anchors x anchors: the tiles (i, j) with i <= j, j-th triangle after j-th triangle; then anchors x other candidates,
// row by row
template <int kTile, typename In>
__device__ Place place(const Batch<In>& batch) {
  const int64_t own = (batch.anchors + kTile - 1) / kTile, triangle = own * (own + 1) / 2, t = blockIdx.x;
  if (t < triangle) {
    int64_t j = int64_t((sqrt(8.0 * double(t) + 1) - 1) / 2);
    while (j * (j + 1) / 2 > t) --j;  // sqrt may round either way
    while ((j + 1) * (j + 2) / 2 <= t) ++j;
    const int64_t i = t - j * (j + 1) / 2;
    return {int(i) * kTile, batch.anchors, int(j) * kTile, batch.anchors, i != j, i == j};
  }
  const int64_t i = (t - triangle) % own, j = (t - triangle) / own;
  return {int(i) * kTile, batch.anchors, batch.anchors + int(j) * kTile, batch.candidates, false, false};
}

// A thread's share of a tile: kSide x kSide values, rows and columns in groups of four so that shared memory is read as
// vectors. 16 threads share a row, 16 a column. The lanes' bits that differ among those are kRowLanes and kColumnLanes;
// what shuffles do not reach is kRowParts and kColumnParts partial results.
template <int kSide>
struct SimtShare {
  static constexpr int kTile = 16 * kSide, kRows = kSide, kColumns = kSide;
  static constexpr int kRowLanes = 15, kColumnLanes = 16, kRowParts = 1, kColumnParts = 8;
  __device__ static int row(int i) { return i / 4 * 64 + int(threadIdx.x) / 16 * 4 + i % 4; }
  __device__ static int column(int j) { return j / 4 * 64 + int(threadIdx.x) % 16 * 4 + j % 4; }
  __device__ static int row_part() { return 0; }
  __device__ static int column_part() { return int(threadIdx.x) / 32; }
};

// What a tile's epilogue needs of its rows and columns, in shared memory: 0..kTile the rows, then the columns.
template <typename T, int kTile>
struct Ends {
  Shared<int64_t, 2 * kTile> labels;
  Shared<T, 2 * kTile> norms;   // NaN beyond the end, which no winner can have
  Shared<T, 2 * kTile> limits;  // of an anchor's negatives, which must lie beyond
};

template <typename In, typename T, int kTile>
__device__ void load_ends(const Batch<In>& batch, const T* norms, const Winners<T>& winners, const Place& at, Pass pass,
                          Ends<T, kTile>& ends) {
  const int t = int(threadIdx.x), j = t < kTile ? at.rows + t : at.columns + t - kTile;
  if (t >= 2 * kTile) return;
  const bool inside = j < (t < kTile ? at.row_end : at.column_end);
  ends.labels.set(t, inside ? batch.labels[j] : 0);
  ends.norms.set(t, inside ? norms[j] : T(NAN));
  ends.limits.set(t, inside && pass.beyond && j < batch.anchors ? winners.value(0, j) : -T(INFINITY));
}

// A block's winners for the search, (2, parts, tile): positives, negatives.
template <typename Share>
using Keys = Shared<Key, 2 * Share::kColumnParts * Share::kTile>;

// A thread's best so far, ties to the first; at -1: none. For double, `only` one whose value is the one that is wanted.
template <typename T>
struct Best {
  T value = -T(INFINITY), wanted = 0;
  int at = -1;
  bool only = false;
  __device__ void consider(bool may, T candidate, int j) {
    if constexpr (sizeof(T) == 8) may = may && (!only || candidate == wanted);
    if (may && candidate > value) {
      value = candidate;
      at = j;
    }
  }
  __device__ Key key(int row) const {
    if (at < 0) return 0;
    if constexpr (sizeof(T) == 4) {
      return Key(ordered(value)) << 32 | ~uint32_t(row);
    } else {
      return only ? Key(~uint32_t(row)) : ordered(value);
    }
  }
};

// Best key of the lanes that differ in the bits of kLanes only.
template <int kLanes>
__device__ inline Key best_of_lanes(Key key) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    if (kLanes & bit) {
      const Key other = __shfl_xor_sync(kAllLanes, key, bit);
      key = other > key ? other : key;
    }
  }
  return key;
}

// Winners of the tile's rows as anchors (kByColumn: of its columns), from a thread's share `order` of the pairs'
// distances, in any monotone form, and a bit `same` for each; then of the block, then of all blocks.
template <typename Share, bool kByColumn, typename T>
__device__ void search(const T (&order)[Share::kRows][Share::kColumns], uint64_t same, const Place& at, Pass pass,
                       const Winners<T>& winners, Ends<T, Share::kTile>& ends, Keys<Share>& keys) {
  constexpr int kTile = Share::kTile, kParts = Share::kColumnParts;
  constexpr int kAnchors = kByColumn ? Share::kColumns : Share::kRows;
  constexpr int kCandidates = kByColumn ? Share::kRows : Share::kColumns;
  constexpr int kLanes = kByColumn ? Share::kColumnLanes : Share::kRowLanes;
  constexpr int kUsed = kByColumn ? Share::kColumnParts : Share::kRowParts;
  const int anchors = kByColumn ? at.columns : at.rows, candidates = kByColumn ? at.rows : at.columns;
  const int anchor_end = kByColumn ? at.column_end : at.row_end;
  const int part = kByColumn ? Share::column_part() : Share::row_part();
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {  // positives, negatives
    const uint64_t may = which ? ~same : same;
    const T sign = which == 0 || pass.farthest ? 1 : -1;
#pragma unroll
    for (int i = 0; i < kAnchors; ++i) {
      const int in_tile = kByColumn ? Share::column(i) : Share::row(i), a = anchors + in_tile;
      const T limit = which ? ends.limits.get(kByColumn * kTile + in_tile) : -T(INFINITY);
      Best<T> best;
      if constexpr (sizeof(T) == 8) {
        best.only = pass.rows;
        best.wanted = pass.rows && a < anchor_end ? winners.value(pass.slot(which), a) : 0;
      }
#pragma unroll
      for (int j = 0; j < kCandidates; ++j) {
        const int row = kByColumn ? j : i, column = kByColumn ? i : j;
        const T value = order[row][column];
        best.consider((may >> (row * Share::kColumns + column) & 1) && value > limit, sign * value, j);
      }
      const int row = candidates + (kByColumn ? Share::row(best.at) : Share::column(best.at));
      const Key key = best_of_lanes<kLanes>(best.key(row));
      if ((lane() & kLanes) == 0) keys.set((which * kParts + part) * kTile + in_tile, key);
    }
  }
  __syncthreads();
  const int t = int(threadIdx.x), which = t / kTile, a = anchors + t % kTile;
  if (which < 2 && a < anchor_end) {
    Key best = 0;
    for (int p = 0; p < kUsed; ++p) {
      const Key key = keys.get((which * kParts + p) * kTile + t % kTile);
      best = key > best ? key : best;
    }
    Key* all = pass.rows ? winners.found : winners.values;
    if (best) atomicMax(all + int64_t(pass.slot(which)) * winners.anchors + a, best);
  }
}

// |x|^2 + |y|^2 - 2 x.y of a thread's share in place of x.y; NaN for a row with itself; then the winners both ways.
template <typename Share, typename T>
__device__ void search_tile(T (&product)[Share::kRows][Share::kColumns], const Place& at, Pass pass,
                            const Winners<T>& winners, Ends<T, Share::kTile>& ends, Keys<Share>& keys) {
  static_assert(Share::kRows * Share::kColumns <= 64);
  uint64_t same = 0;
#pragma unroll
  for (int j = 0; j < Share::kColumns; ++j) {
    const int column = Share::column(j);
    const T column_norm = ends.norms.get(Share::kTile + column);
    const int64_t label = ends.labels.get(Share::kTile + column);
#pragma unroll
    for (int i = 0; i < Share::kRows; ++i) {
      const int row = Share::row(i);
      product[i][j] =
          at.itself && row == column ? T(NAN) : fma(T(-2), product[i][j], ends.norms.get(row) + column_norm);
      same |= uint64_t(ends.labels.get(row) == label) << (i * Share::kColumns + j);
    }
  }
  search<Share, false>(product, same, at, pass, winners, ends, keys);
  if (at.columns_are_anchors) {  // the same for the whole block
    __syncthreads();
    search<Share, true>(product, same, at, pass, winners, ends, keys);
  }
}

// -------------------------------------------------------------------------------------------------------------- SIMT

template <typename In>
struct alignas(sizeof(In) * 4 < 16 ? sizeof(In) * 4 : 16) FourOf {
  In at[4];
};

// Four prepared values of row j from column d on, 0 beyond the ends.
template <typename In, typename T>
__device__ void load_four(const Batch<In>& batch, const Prepared<T>& prepared, int j, int end, int d, T (&out)[4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) out[c] = 0;
  if (j >= end || d >= batch.width) return;
  const In* x = batch.row(j) + d;
  const T scale = prepared.scale[j];
  if (batch.vectors) {
    const FourOf<In> four = *reinterpret_cast<const FourOf<In>*>(x);
#pragma unroll
    for (int c = 0; c < 4; ++c) out[c] = fma(T(widen(four.at[c])), scale, -prepared.shift[d + c]);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (d + c < batch.width) out[c] = fma(T(widen(x[c])), scale, -prepared.shift[d + c]);
    }
  }
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

// One tile a block, the next step's values on their way from memory while this step's are multiplied.
template <typename In, typename T, int kSide>
__global__ void __launch_bounds__(kThreads, 2)
    search_pairs(Batch<In> batch, Prepared<T> prepared, Winners<T> winners, Pass pass) {
  using Share = SimtShare<kSide>;
  constexpr int kTile = Share::kTile, kStep = kDepth<kSide>;
  __shared__ Panel<T, kSide> x, y;
  __shared__ Ends<T, kTile> ends;
  __shared__ Keys<Share> keys;
  const Place at = place<kTile>(batch);
  load_ends(batch, prepared.norms, winners, at, pass, ends);
  const int row = int(threadIdx.x) / (kStep / 4), d = int(threadIdx.x) % (kStep / 4) * 4;
  T product[kSide][kSide] = {}, next_x[4], next_y[4];
  const auto load = [&](int begin) {
    load_four(batch, prepared, at.rows + row, at.row_end, begin + d, next_x);
    load_four(batch, prepared, at.columns + row, at.column_end, begin + d, next_y);
  };
  load(0);
  int buffer = 0;
  for (int begin = 0; begin < batch.width; begin += kStep) {
    store_four<kSide>(x, buffer, next_x);
    store_four<kSide>(y, buffer, next_y);
    __syncthreads();  // one barrier a step: the other buffer was read before it
    if (begin + kStep < batch.width) load(begin + kStep);
    multiply<kSide>(x, y, buffer, product);
    buffer ^= 1;
  }
  search_tile<Share>(product, at, pass, winners, ends, keys);
}

}  // namespace triplet::gpu
