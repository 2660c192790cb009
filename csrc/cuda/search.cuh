// The search for the mined rows: tiles of x.y products, each pair of the anchors' tiles visited once, for its row as an
// anchor and for its column. Here for every type; search_mma.cuh has tensor cores for some.
//
// Products are rounded, by a bounded slack (Rounding, common.cuh), so the search does not tell which candidate wins. It
// keeps the best few, by what each may be at best, and a bound: what one of them is at worst. What is below the bound
// cannot win, and is dropped. As bounds only rise, what is dropped under an early one is below the last one as well, so
// the result depends on no order: those of the kept that reach the bound are the best kKept that do.
#pragma once

#include "cuda/common.cuh"

namespace triplet::gpu {

enum class Want { positive, nearest, farthest, beyond };  // the farthest positive; a negative; one beyond the positive

__host__ __device__ constexpr int slot_of(Want want) {
  return want == Want::positive ? 0 : want == Want::beyond ? 2 : 1;
}

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
  Shared<T, 2 * kTile> norms;  // NaN beyond the end, which no comparison takes
  Shared<float, 2 * kTile> slacks;
  Shared<float, 2 * kTile> limits;           // order of an anchor's positive, beyond which negatives are sought
  Shared<float, kSlots * 2 * kTile> floors;  // what candidates of an anchor must reach
};

template <bool kBeyond, typename In, typename T, int kTile>
__device__ void load_ends(const Batch<In>& batch, const Prepared<T>& prepared, const Winners& winners, const Place& at,
                          Ends<T, kTile>& ends) {
  const int t = int(threadIdx.x), j = t < kTile ? at.rows + t : at.columns + t - kTile;
  if (t >= 2 * kTile) return;
  const bool inside = j < (t < kTile ? at.row_end : at.column_end), anchor = inside && j < batch.anchors;
  const T norm = inside ? prepared.norms[j] : T(NAN);
  ends.labels.set(t, inside ? batch.labels[j] : 0);
  ends.norms.set(t, norm);
  ends.slacks.set(t, prepared.rounding.slack(float(norm)));
  if (kBeyond) ends.limits.set(t, anchor ? winners.limits[j] : 0.f);
  for (int slot = 0; slot < kSlots; ++slot) {
    ends.floors.set(slot * 2 * kTile + t, anchor ? floor_of(*winners.bound(slot, j)) : INFINITY);
  }
}

// Of the anchors of a tile, the least that is known of their best candidates there: (parts, tile).
template <typename Share>
using Tops = Shared<float, Share::kColumnParts * Share::kTile>;

// The largest value of the lanes that differ in the bits of kLanes only.
template <int kLanes>
__device__ inline float max_of_lanes(float x) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    if (kLanes & bit) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bit));
  }
  return x;
}

// One of an anchor's best: what a place has no room for moves on to the next. In the end each place has the best of
// what came by, in whatever order it came.
__device__ inline void keep(Key* kept, Key key, float floor) {
#pragma unroll 1
  for (int k = 0; k < kKept && value_of(key) >= floor; ++k) {
    const Key before = atomicMax(kept + k, key);
    key = before < key ? before : key;
  }
}

// Candidates of the tile's rows as anchors (kByColumn: of its columns), from a thread's share of the pairs' `order` and
// a bit `same` for each.
template <typename Share, bool kByColumn, Want kWant, typename T>
__device__ void seek(const float (&order)[Share::kRows][Share::kColumns], uint64_t same, const Place& at,
                     const Winners& winners, Ends<T, Share::kTile>& ends, Tops<Share>& tops) {
  constexpr int kTile = Share::kTile, kSlot = slot_of(kWant);
  constexpr int kAnchors = kByColumn ? Share::kColumns : Share::kRows;
  constexpr int kCandidates = kByColumn ? Share::kRows : Share::kColumns;
  constexpr int kLanes = kByColumn ? Share::kColumnLanes : Share::kRowLanes;
  constexpr int kParts = kByColumn ? Share::kColumnParts : Share::kRowParts;
  constexpr float kSign = kWant == Want::positive || kWant == Want::farthest ? 1 : -1;
  const int anchors = kByColumn ? at.columns : at.rows, candidates = kByColumn ? at.rows : at.columns;
  const int part = kByColumn ? Share::column_part() : Share::row_part();
  const auto end_of = [](int i) { return kByColumn ? kTile + Share::column(i) : Share::row(i); };
  const auto slack_of = [&](int j) { return ends.slacks.get(kByColumn ? Share::row(j) : kTile + Share::column(j)); };
  // Anchor i's candidate j, the better the greater, but for the anchor's own slack: at best, at worst; NaN: none.
  const auto at_best = [&](int i, int j) {
    const int row = kByColumn ? j : i, column = kByColumn ? i : j;
    const float value = kSign * order[row][column], slack = slack_of(j);
    bool may = true;
    if (kWant == Want::positive) may = same >> (row * Share::kColumns + column) & 1;
    if (kWant == Want::beyond) may = value - slack <= ends.slacks.get(end_of(i)) - ends.limits.get(end_of(i));
    return may ? value + slack : NAN;
  };
  const auto at_worst = [&](int i, int j) {
    const float best = at_best(i, j);
    if (kWant == Want::beyond && !(best < -ends.limits.get(end_of(i)) - ends.slacks.get(end_of(i)))) return float(NAN);
    return best - 2 * slack_of(j);
  };
  const auto floor_at = [&](int end) { return kSlot * 2 * kTile + end; };
  float best[kAnchors];
#pragma unroll
  for (int i = 0; i < kAnchors; ++i) {
    best[i] = -INFINITY;
#pragma unroll
    for (int j = 0; j < kCandidates; ++j) best[i] = fmaxf(best[i], at_best(i, j));
    float top = -INFINITY;
    if (__any_sync(kAllLanes, best[i] >= ends.floors.get(floor_at(end_of(i))))) {  // rare, once some tiles have gone by
#pragma unroll
      for (int j = 0; j < kCandidates; ++j) top = fmaxf(top, at_worst(i, j));
      top = max_of_lanes<kLanes>(top) - 2 * ends.slacks.get(end_of(i));
    }
    if ((lane() & kLanes) == 0) tops.set(part * kTile + end_of(i) % kTile, top);
  }
  __syncthreads();
  const int t = int(threadIdx.x), mine = floor_at(kByColumn * kTile + t % kTile);
  if (t < kTile) {
    float top = -INFINITY;
    for (int p = 0; p < kParts; ++p) top = fmaxf(top, tops.get(p * kTile + t));
    if (top > ends.floors.get(mine)) {
      ends.floors.set(mine, fmaxf(top, floor_of(atomicMax(winners.bound(kSlot, anchors + t), ordered(top)))));
    }
  }
  __syncthreads();
  uint64_t passes = 0;
#pragma unroll
  for (int i = 0; i < kAnchors; ++i) {
    const float floor = ends.floors.get(floor_at(end_of(i)));
    if (!(best[i] >= floor)) continue;
#pragma unroll
    for (int j = 0; j < kCandidates; ++j) passes |= uint64_t(at_best(i, j) >= floor) << (i * kCandidates + j);
  }
  for (; passes; passes &= passes - 1) {
    const int bit = __ffsll(int64_t(passes)) - 1, i = bit / kCandidates, j = bit % kCandidates;
    float value = 0;  // order of the pair: arrays in registers have no addresses
#pragma unroll
    for (int k = 0; k < kAnchors * kCandidates; ++k) {
      const int row = kByColumn ? k % kCandidates : k / kCandidates;
      value = k == bit ? kSign * order[row][kByColumn ? k / kCandidates : k % kCandidates] : value;
    }
    const int row = candidates + (kByColumn ? Share::row(j) : Share::column(j));
    keep(winners.of(kSlot, anchors + end_of(i) % kTile), key_of(value + slack_of(j), row),
         ends.floors.get(floor_at(end_of(i))));
  }
}

template <typename Share, Want kWant, typename T>
__device__ void seek_both_ways(const float (&order)[Share::kRows][Share::kColumns], uint64_t same, const Place& at,
                               const Winners& winners, Ends<T, Share::kTile>& ends, Tops<Share>& tops) {
  seek<Share, false, kWant>(order, same, at, winners, ends, tops);
  if (at.columns_are_anchors) seek<Share, true, kWant>(order, same, at, winners, ends, tops);  // for the whole block
}

// |x|^2 + |y|^2 - 2 x.y of a thread's share from x.y; NaN for a row with itself; then the candidates both ways.
// Semihard mining has a pass for the positives and, with kBeyond, one for the negatives.
template <typename Share, bool kBeyond, typename T>
__device__ void search_tile(const T (&product)[Share::kRows][Share::kColumns], const Place& at, bool negatives,
                            const Winners& winners, Ends<T, Share::kTile>& ends, Tops<Share>& tops) {
  static_assert(Share::kRows * Share::kColumns <= 64);
  float order[Share::kRows][Share::kColumns];
  uint64_t same = 0;
#pragma unroll
  for (int j = 0; j < Share::kColumns; ++j) {
    const int column = Share::column(j);
    const T column_norm = ends.norms.get(Share::kTile + column);
    const int64_t label = ends.labels.get(Share::kTile + column);
#pragma unroll
    for (int i = 0; i < Share::kRows; ++i) {
      const int row = Share::row(i);
      const T squared = fma(T(-2), product[i][j], ends.norms.get(row) + column_norm);
      order[i][j] = at.itself && row == column ? NAN : float(squared);
      same |= uint64_t(ends.labels.get(row) == label) << (i * Share::kColumns + j);
    }
  }
  if (!kBeyond) {
    seek_both_ways<Share, Want::positive>(order, same, at, winners, ends, tops);
    if (!negatives) return;
  }
#pragma unroll
  for (int i = 0; i < Share::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Share::kColumns; ++j) {
      if (same >> (i * Share::kColumns + j) & 1) order[i][j] = NAN;  // no negative
    }
  }
  if (kBeyond) {
    seek_both_ways<Share, Want::farthest>(order, same, at, winners, ends, tops);
    seek_both_ways<Share, Want::beyond>(order, same, at, winners, ends, tops);
  } else {
    seek_both_ways<Share, Want::nearest>(order, same, at, winners, ends, tops);
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
template <typename In, typename T, int kSide, bool kBeyond>
__global__ void __launch_bounds__(kThreads, 2)
    search_pairs(Batch<In> batch, Prepared<T> prepared, Winners winners, bool negatives) {
  using Share = SimtShare<kSide>;
  constexpr int kTile = Share::kTile, kStep = kDepth<kSide>;
  __shared__ Panel<T, kSide> x, y;
  __shared__ Ends<T, kTile> ends;
  __shared__ Tops<Share> tops;
  const Place at = place<kTile>(batch);
  load_ends<kBeyond>(batch, prepared, winners, at, ends);
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
  search_tile<Share, kBeyond>(product, at, negatives, winners, ends, tops);
}

}  // namespace triplet::gpu
