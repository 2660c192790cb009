// The search for the mined rows: tiles of x.y products, each pair of the anchors' tiles visited once, for its row as an
// anchor and for its column. For every type: search_simt.cuh; on tensor cores: search_mma.cuh.
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

  // the last one for those beyond the end, which no search takes
  __device__ int row(int i) const { return rows + i < row_end ? rows + i : row_end - 1; }
  __device__ int column(int j) const { return columns + j < column_end ? columns + j : column_end - 1; }

  __device__ bool itself() const { return rows == columns; }
  __device__ bool columns_are_anchors() const { return columns < row_end && !itself(); }  // of pairs not seen before
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
    return {int(i) * kTile, batch.anchors, int(j) * kTile, batch.anchors};
  }
  const int64_t i = (t - triangle) % own, j = (t - triangle) / own;
  return {int(i) * kTile, batch.anchors, batch.anchors + int(j) * kTile, batch.candidates};
}

// May two rows of the tile have the same label? The same answer for the whole block; every thread has a word.
template <int kTile, typename In>
__device__ bool may_have_positives(const Batch<In>& batch, const Filters& filters, const Place& at) {
  const auto labels = [&](int begin, int end) {
    uint32_t word = 0;
    for (int row = begin; row < begin + kTile && row < end; row += kGroup) word |= filters.of(batch, row)[threadIdx.x];
    return word;
  };
  return __syncthreads_or((labels(at.rows, at.row_end) & labels(at.columns, at.column_end)) != 0);
}

// A thread's share of a tile: kSide x kSide values, rows and columns in groups of four so that shared memory is read as
// vectors. 16 threads share a row, 16 a column. The lanes' bits that differ among those are kRowLanes and kColumnLanes;
// what shuffles do not reach is kRowParts and kColumnParts partial results.
template <int kSide>
struct SimtShare {
  static constexpr int kTile = 16 * kSide, kRows = kSide, kColumns = kSide;
  static constexpr bool kCosine = false;  // only: candidates have no slack
  static constexpr int kRowLanes = 15, kColumnLanes = 16, kRowParts = 1, kColumnParts = 8;
  __device__ static int row(int i) { return i / 4 * 64 + int(threadIdx.x) / 16 * 4 + i % 4; }
  __device__ static int column(int j) { return j / 4 * 64 + int(threadIdx.x) % 16 * 4 + j % 4; }
  __device__ static int row_part() { return 0; }
  __device__ static int column_part() { return int(threadIdx.x) / 32; }
};

// What a launch looks for. Semihard mining has a pass for the positives and then one for the negatives, which needs to
// know them (kBeyond).
struct Pass {
  bool negatives;  // beside the positives, the nearest ones
};

// What a tile's epilogue needs of its rows and columns, in shared memory: 0..kTile the rows, then the columns.
template <typename T, int kTile>
struct Ends {
  Shared<int32_t, 4 * kTile> labels;  // their lower halves, then the upper ones
  Shared<T, 2 * kTile> norms;         // NaN beyond the end, which no comparison takes
  Shared<float, 2 * kTile> slacks;
  Shared<float, 2 * kTile> limits;           // of an anchor's positive, beyond which negatives are sought
  Shared<float, kSlots * 2 * kTile> floors;  // what candidates of an anchor must reach
  Shared<Place, 1> place;                    // here, since registers are few
  Shared<int, 1> mixed;                      // whether there may be positives
};

// Returns false where the tile has nothing that the pass looks for.
template <bool kBeyond, typename In, typename T, int kTile>
__device__ bool load_ends(const Batch<In>& batch, const Prepared<T>& prepared, const Winners& winners, const Place& at,
                          Pass pass, Ends<T, kTile>& ends) {
  if (threadIdx.x == 0) ends.place.set(0, at);
  const bool mixed = may_have_positives<kTile>(batch, prepared.filters, at);  // a barrier
  if (!kBeyond && !mixed && !pass.negatives) return false;
  if (threadIdx.x == 0) ends.mixed.set(0, mixed);
  const int t = int(threadIdx.x), j = t < kTile ? at.rows + t : at.columns + t - kTile;
  if (t >= 2 * kTile) return true;
  const bool inside = j < (t < kTile ? at.row_end : at.column_end), anchor = inside && j < batch.anchors;
  const T norm = inside ? prepared.norms[j] : T(NAN);
  const int64_t label = inside ? batch.labels[j] : 0;
  ends.labels.set(t, int32_t(label));
  ends.labels.set(2 * kTile + t, int32_t(label >> 32));
  ends.norms.set(t, norm);
  ends.slacks.set(t, winners.rounding.of_candidate(float(norm)));
  if (kBeyond) ends.limits.set(t, anchor ? winners.limits[j] : 0.f);
  for (int slot = kBeyond; slot < kBeyond + 2; ++slot) {
    ends.floors.set(slot * 2 * kTile + t, anchor ? floor_of(*winners.bound(slot, j)) : INFINITY);
  }
  return true;
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

// Looks for candidates of the tile's rows as anchors (kByColumn: of its columns) in a thread's share of the pairs'
// `order`: squared distances, those of negatives times -1; NaN: no pair that is looked for.
template <typename Share, bool kByColumn, Want kWant, typename T>
struct Seeker {
  static constexpr int kTile = Share::kTile, kSlot = slot_of(kWant);
  static constexpr int kAnchors = kByColumn ? Share::kColumns : Share::kRows;
  static constexpr int kCandidates = kByColumn ? Share::kRows : Share::kColumns;
  static constexpr int kLanes = kByColumn ? Share::kColumnLanes : Share::kRowLanes;
  static constexpr int kParts = kByColumn ? Share::kColumnParts : Share::kRowParts;
  static constexpr float kSign = kWant == Want::farthest ? -1 : 1;

  const float (&order)[Share::kRows][Share::kColumns];
  const Place& at;
  const Winners& winners;
  Ends<T, kTile>& ends;
  Tops<Share>& tops;

  // of anchor i and candidate j of a thread
  __device__ static int in_row(int i, int j) { return kByColumn ? j : i; }
  __device__ static int in_column(int i, int j) { return kByColumn ? i : j; }
  __device__ static int anchor(int i) { return kByColumn ? Share::column(i) : Share::row(i); }
  __device__ static int candidate(int j) { return kByColumn ? Share::row(j) : Share::column(j); }

  __device__ int floor_at(int anchor) const { return (2 * kSlot + kByColumn) * kTile + anchor; }
  __device__ float slack_of(int j) const { return ends.slacks.get(!kByColumn * kTile + candidate(j)); }
  __device__ float better(float value, int j) const { return Share::kCosine ? value : value + slack_of(j); }
  __device__ float worse(float value, int j) const { return Share::kCosine ? value : value - slack_of(j); }
  __device__ float own_slack(int i) const {
    return ends.slacks.get(kByColumn * kTile + anchor(i)) + winners.rounding.pair;
  }
  __device__ float limit_of(int i) const { return ends.limits.get(kByColumn * kTile + anchor(i)); }

  // How good a candidate is at best, the better the greater, but for its anchor's slack; NaN: it is none. Positives are
  // not told from negatives here. No harm: bounds from those are below 0, what positives reach.
  __device__ float at_best(int i, int j) const {
    const float value = kSign * order[in_row(i, j)][in_column(i, j)];
    if (kWant == Want::beyond && !(worse(value, j) <= own_slack(i) - limit_of(i))) return NAN;
    return better(value, j);
  }

  // And at worst; NaN: it may be none.
  __device__ float at_worst(int i, int j) const {
    const float best = at_best(i, j);
    if (kWant == Want::beyond && !(best < -limit_of(i) - own_slack(i))) return NAN;
    return worse(worse(best, j), j);
  }

  // A bit for each of the thread's anchors that has a candidate of interest; `tops` of those of the warp.
  __device__ unsigned look() const {
    const int part = kByColumn ? Share::column_part() : Share::row_part();
    unsigned open = 0;
#pragma unroll
    for (int i = 0; i < kAnchors; ++i) {
      float best = -INFINITY, top = -INFINITY;
#pragma unroll
      for (int j = 0; j < kCandidates; ++j) best = fmaxf(best, at_best(i, j));
      const bool opens = best >= ends.floors.get(floor_at(anchor(i)));
      open |= unsigned(opens) << i;
      if (__any_sync(kAllLanes, opens)) {  // rare, once some tiles have gone by
#pragma unroll
        for (int j = 0; j < kCandidates; ++j) top = fmaxf(top, at_worst(i, j));
        top = max_of_lanes<kLanes>(top) - 2 * own_slack(i);
      }
      if ((lane() & kLanes) == 0) tops.set(part * kTile + anchor(i), top);
    }
    return open;
  }

  // The tile's tops into the bounds of all tiles, and those into the floors. A thread an anchor.
  __device__ void raise_floors() const {
    const int t = int(threadIdx.x), mine = floor_at(t);
    if (t >= kTile) return;
    float top = -INFINITY;
    for (int p = 0; p < kParts; ++p) top = fmaxf(top, tops.get(p * kTile + t));
    if (!(top > ends.floors.get(mine))) return;
    const uint32_t before = atomicMax(winners.bound(kSlot, (kByColumn ? at.columns : at.rows) + t), ordered(top));
    ends.floors.set(mine, fmaxf(top, floor_of(before)));
  }

  // Keeps what reaches the floors, of the anchors that are open.
  __device__ void list(unsigned open) const {
    uint64_t passes = 0;
#pragma unroll
    for (int i = 0; i < kAnchors; ++i) {
      if (!(open >> i & 1)) continue;
      const float floor = ends.floors.get(floor_at(anchor(i)));
#pragma unroll
      for (int j = 0; j < kCandidates; ++j) {
        const bool may =
            kWant != Want::positive || bits_as<int32_t>(order[in_row(i, j)][in_column(i, j)]) >= 0;  // -0: no
        passes |= uint64_t(may && at_best(i, j) >= floor) << (i * kCandidates + j);
      }
    }
    for (; passes; passes &= passes - 1) {
      const int bit = __ffsll(int64_t(passes)) - 1, i = bit / kCandidates, j = bit % kCandidates;
      float value = 0;  // order[i, j], by comparisons: arrays in registers have no addresses
#pragma unroll
      for (int k = 0; k < kAnchors * kCandidates; ++k) {
        value = k == bit ? order[in_row(k / kCandidates, k % kCandidates)][in_column(k / kCandidates, k % kCandidates)]
                         : value;
      }
      const int a = (kByColumn ? at.columns : at.rows) + anchor(i);
      const int row = (kByColumn ? at.rows : at.columns) + candidate(j);
      keep(winners.of(kSlot, a), key_of(better(kSign * value, j), row), ends.floors.get(floor_at(anchor(i))));
    }
  }

  __device__ void run() const {
    const unsigned open = look();
    __syncthreads();
    raise_floors();
    __syncthreads();
    list(open);
  }
};

// Candidates of the rows, and of the columns.
template <typename Share, Want kWant, typename T>
__device__ void seek(const float (&order)[Share::kRows][Share::kColumns], const Place& at, const Winners& winners,
                     Ends<T, Share::kTile>& ends, Tops<Share>& tops) {
  Seeker<Share, false, kWant, T>{order, at, winners, ends, tops}.run();
  if (at.columns_are_anchors()) Seeker<Share, true, kWant, T>{order, at, winners, ends, tops}.run();
}

// The pairs' order from their x.y, a thread's share; then their candidates.
template <typename Share, bool kBeyond, typename T>
__device__ void search_tile(const T (&product)[Share::kRows][Share::kColumns], Pass pass, const Winners& winners,
                            Ends<T, Share::kTile>& ends, Tops<Share>& tops) {
  constexpr int kTile = Share::kTile;
  const Place at = ends.place.get(0);
  static_assert(Share::kRows * Share::kColumns <= 64);
  float order[Share::kRows][Share::kColumns];
  const auto for_all = [&](auto&& f) {
#pragma unroll
    for (int j = 0; j < Share::kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < Share::kRows; ++i) f(i, j, Share::row(i), kTile + Share::column(j));
    }
  };
  for_all([&](int i, int j, int row, int column) {
    order[i][j] = float(fma(T(2), product[i][j], -ends.norms.get(row) - ends.norms.get(column)));
  });
  if (ends.mixed.get(0)) {
    // where rounding makes a squared distance negative, its size is nearer the truth
    for_all([&](int i, int j, int, int) { order[i][j] = fabsf(order[i][j]); });
    if (at.itself()) {  // no row is its own positive; one whose norm is clamped is not even near itself
      for_all([&](int i, int j, int row, int column) {
        if (column == kTile + row) order[i][j] = NAN;
      });
    }
    for (int half = 0; half < 2; ++half) {  // of the labels: registers are few
      for_all([&](int i, int j, int row, int column) {
        const bool same = ends.labels.get(half * 2 * kTile + row) == ends.labels.get(half * 2 * kTile + column);
        order[i][j] = same ? order[i][j] : -fabsf(order[i][j]);
      });
    }
    if (!kBeyond) seek<Share, Want::positive>(order, at, winners, ends, tops);
    for_all([&](int i, int j, int, int) { order[i][j] = bits_as<int32_t>(order[i][j]) < 0 ? order[i][j] : NAN; });
  }
  if (kBeyond) {
    seek<Share, Want::farthest>(order, at, winners, ends, tops);
    seek<Share, Want::beyond>(order, at, winners, ends, tops);
  } else if (pass.negatives) {
    seek<Share, Want::nearest>(order, at, winners, ends, tops);
  }
}

}  // namespace triplet::gpu
