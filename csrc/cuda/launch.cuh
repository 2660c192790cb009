// The kernels in their order, for a `launch(kernel, blocks, arguments...)` that runs them one after another, with
// kThreads threads a block: on a stream by op.cu, under emulation by the tests.
#pragma once

#include <limits>

#include "cuda/all.cuh"
#include "cuda/mined.cuh"
#include "cuda/search_mma.cuh"
#include "cuda/prepare.cuh"

namespace triplet::gpu {

inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Carves arrays from one allocation, aligned to 16 bytes; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;  // bytes
  template <typename X>
  X* take(int64_t count) {
    X* at = base ? reinterpret_cast<X*>(base + used) : nullptr;
    used += parts_of(count * int64_t(sizeof(X)), 16) * 16;
    return at;
  }
};

inline int slots_of(Mining mining) { return mining == Mining::all ? 0 : mining == Mining::hard ? 2 : kSlots; }

// What both passes keep of a batch, and the forward pass of the search.
template <typename T>
struct Workspace {
  Prepared<T> prepared;
  Winners winners;
  double* sums;     // (stripes, width)
  int64_t* counts;  // (anchors,)
  Key* zeroed;      // the first `zeroes` keys of the allocation start as 0
  int64_t zeroes;
  int stripes;

  // Arrays for `slots` winners of each anchor; 0: nothing will be searched.
  template <typename In>
  Workspace(const Batch<In>& batch, int slots, Arena& arena) {
    zeroed = arena.take<Key>(2);
    prepared.extreme = zeroed;
    prepared.unsound = zeroed + 1;
    winners.anchors = batch.anchors;
    winners.kept = arena.take<Key>(int64_t(slots) * batch.anchors * kKept);
    winners.bounds = arena.take<uint32_t>(int64_t(slots) * batch.anchors);
    const int64_t groups = parts_of(batch.anchors, kGroup) + parts_of(batch.candidates - batch.anchors, kGroup);
    prepared.filters.words = slots ? arena.take<uint32_t>(groups * kThreads) : nullptr;
    prepared.shift = arena.take<T>(parts_of(batch.width, 4) * 4);
    zeroes = arena.used / int64_t(sizeof(Key));
    winners.limits = arena.take<float>(batch.anchors);
    winners.decisive_limits = arena.take<double>(batch.anchors);
    stripes = int(parts_of(batch.candidates, 512) < 128 ? parts_of(batch.candidates, 512) : 128);
    sums = arena.take<double>(int64_t(stripes) * batch.width);
    counts = arena.take<int64_t>(batch.anchors);
    prepared.scale = arena.take<T>(batch.candidates);
    prepared.norms = arena.take<T>(batch.candidates);
  }
};

// What the backward pass of mined rows keeps beside it.
template <typename T>
struct MinedWorkspace {
  Pairs<T> pairs;
  Lists lists;
  Key* zeroed;
  int64_t zeroes;

  template <typename In>
  MinedWorkspace(const Batch<In>& batch, Arena& arena) {
    const int64_t pair_count = 2 * int64_t(batch.anchors), before = arena.used;
    lists.chosen_by = arena.take<int>(batch.candidates);
    lists.placed = arena.take<int>(batch.candidates);
    lists.used = arena.take<int>(1);
    zeroed = reinterpret_cast<Key*>(lists.chosen_by);
    zeroes = (arena.used - before) / int64_t(sizeof(Key));
    lists.starts = arena.take<int>(batch.candidates);
    lists.unsorted = arena.take<int>(pair_count);
    lists.listed = arena.take<int>(pair_count);
    pairs.chosen = arena.take<int>(pair_count);
    pairs.pulls = arena.take<Pull<T>>(pair_count);
  }
};

// And that of all triplets.
template <typename T>
struct AllWorkspace {
  T *factors, *sums;  // (anchors, candidates), (gradient_rows, width)
  int anchors;

  template <typename In>
  AllWorkspace(const Batch<In>& batch, int gradient_rows, Arena& arena) {
    anchors = batch.anchors < kAnchorsAtOnce ? batch.anchors : kAnchorsAtOnce;
    factors = arena.take<T>(int64_t(anchors) * batch.candidates);
    sums = arena.take<T>(int64_t(gradient_rows) * batch.width);
  }
};

// Bytes of the allocation that `forward` or `backward` needs.
template <typename T, typename In>
int64_t forward_bytes(const Batch<In>& batch, Mining mining) {
  Arena arena{nullptr};
  Workspace<T>(batch, slots_of(mining), arena);
  return arena.used;
}

template <typename T, typename In>
int64_t backward_bytes(const Batch<In>& batch, Mining mining, int gradient_rows) {
  Arena arena{nullptr};
  Workspace<T>(batch, 0, arena);
  if (mining == Mining::all) {
    AllWorkspace<T>(batch, gradient_rows, arena);
  } else {
    MinedWorkspace<T>(batch, arena);
  }
  return arena.used;
}

// Properties of the device on which the choice of kernels depends.
struct Machine {
  int processors;     // streaming multiprocessors
  bool tensor_cores;  // mma m16n8k16 of halves: compute capability 8.0 and above
};

// One thread for each of `count`, or one warp.
inline dim3 threads_for(int64_t count) { return dim3(unsigned(parts_of(count, kThreads))); }
inline dim3 warps_for(int64_t count) { return dim3(unsigned(parts_of(count, kWarps))); }

// `searched`: the prepared rows will be searched, rather than measured pair by pair.
template <typename Launch, typename In, typename T>
void prepare(Launch& launch, const Batch<In>& batch, Distance distance, const Workspace<T>& work, bool searched) {
  launch(&clear, threads_for(work.zeroes), work.zeroed, work.zeroes);
  launch(&measure<In, T>, warps_for(batch.candidates), batch, distance, work.prepared);
  if (distance == Distance::cosine || !searched) return;
  launch(&column_sums<In, T>, dim3(unsigned(parts_of(batch.width, 32)), unsigned(work.stripes)), batch, work.prepared,
         work.sums);
  launch(&column_means<T>, threads_for(batch.width), work.sums, work.stripes, batch.candidates, batch.width,
         work.prepared.shift);
  launch(&centred_norms<In, T>, warps_for(batch.candidates), batch, work.prepared);
}

template <typename In>
dim3 tiles_of(const Batch<In>& batch, int64_t size) {
  const int64_t own = parts_of(batch.anchors, size), others = parts_of(batch.candidates - batch.anchors, size);
  const int64_t tiles = own * (own + 1) / 2 + own * others;
  require(tiles <= std::numeric_limits<int32_t>::max(), "too many rows for the CUDA op: ", batch.anchors, " and ",
          batch.candidates - batch.anchors, " others");
  return dim3(unsigned(tiles));
}

// How far rounding moves the order of a search, as multiples of the unit of its arithmetic. A product's sum of D terms
// is off by D units of |x| |y|; on tensor cores, which cut off digits, by 1.6 D + 25, as 16 terms and what they are
// added to may lose 26 units. The rest: rows as the search sees them, norms, `decisive`, and the search's own sums,
// which are of float32 for doubles too.
template <typename T>
Rounding rounding_of(Distance distance, int width, bool tensor_cores) {
  const double unit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53, terms = tensor_cores ? 2. * width + 128 : 1.3 * width + 96;
  const float slack = float(terms * unit + (sizeof(T) == 8 ? 8 * 0x1p-24 : 0));
  if (distance == Distance::cosine) return {0, 0, 2 * slack};
  return {slack, float(2 * width * 0x1p-126), 0};  // least: products too small for float32
}

// One pass over all pairs: large tiles where they fill the device, on tensor cores where these serve; else small ones.
template <bool kBeyond, typename Launch, typename In, typename T>
void search(Launch& launch, const Machine& machine, const Batch<In>& batch, Distance distance, const Workspace<T>& work,
            Pass pass) {
  const dim3 large = tiles_of(batch, 128);
  const auto run = [&](auto kernel, dim3 tiles) { launch(kernel, tiles, batch, work.prepared, work.winners, pass); };
  if (sizeof(T) == 4 && large.x >= unsigned(machine.processors)) {
    if constexpr (sizeof(In) == 2) {
      if (machine.tensor_cores && distance == Distance::cosine) return run(&search_pairs_mma<In, kBeyond>, large);
    }
    if constexpr (sizeof(T) == 4) return run(&search_pairs<In, T, 8, kBeyond>, large);
  }
  run(&search_pairs<In, T, 4, kBeyond>, tiles_of(batch, 64));
}

// `each` except its counts, and `loss` unless it is null.
template <typename T, typename Launch, typename In>
void forward(Launch& launch, const Machine& machine, const Batch<In>& batch, const Settings& settings, char* memory,
             Outputs<T> each, T* loss, int64_t* count) {
  Arena arena{memory};
  Workspace<T> work(batch, slots_of(settings.mining), arena);
  const bool all = settings.mining == Mining::all, semihard = settings.mining == Mining::semihard;
  const Distance distance = settings.distance;
  work.winners.rounding =
      rounding_of<T>(distance, batch.width, sizeof(In) == 2 && machine.tensor_cores && distance == Distance::cosine);
  each.counts = work.counts;
  prepare(launch, batch, distance, work, !all);
  if (!all) search<false>(launch, machine, batch, distance, work, {!semihard});
  if (semihard) {
    launch(&choose_positives<In, T>, warps_for(batch.anchors), batch, distance, work.prepared, work.winners,
           each.positive);
    search<true>(launch, machine, batch, distance, work, {true});
  }
  if (all) {
    launch(&sum_triplets<In, T>, dim3(unsigned(batch.anchors)), batch, settings, work.prepared, each);
  } else {
    launch(&finish<In, T>, warps_for(batch.anchors), batch, settings, work.prepared, work.winners, each);
  }
  launch(&reduce<T>, dim3(1), each, batch.anchors, settings.reduction, work.prepared.unsound, loss, count);
}

// The gradients (gradient_rows, width) of the first candidates.
template <typename T, typename Launch, typename In>
void backward(Launch& launch, const Batch<In>& batch, const Settings& settings, char* memory, const Upstream<T>& up,
              In* gradient, int gradient_rows) {
  Arena arena{memory};
  const Workspace<T> work(batch, 0, arena);
  const Distance distance = settings.distance;
  const T* scale = work.prepared.scale;
  const dim3 a_block_each(unsigned(gradient_rows), 1, 1);
  if (distance == Distance::cosine) prepare(launch, batch, distance, work, false);
  if (settings.mining == Mining::all) {
    const AllWorkspace<T> space(batch, gradient_rows, arena);
    for (int first = 0; first < batch.anchors; first += space.anchors) {
      const int anchors = batch.anchors - first < space.anchors ? batch.anchors - first : space.anchors;
      launch(&weigh_triplets<In, T>, dim3(unsigned(anchors)), batch, settings, scale, up, first, space.factors);
      launch(&pull_rows<In, T>, a_block_each, batch, distance, scale, space.factors, first, anchors, space.sums);
    }
    launch(&finish_gradient<In, T>, warps_for(gradient_rows), batch, distance, scale, up.count, space.sums, gradient,
           gradient_rows);
    return;
  }
  const MinedWorkspace<T> space(batch, arena);
  const int pairs = 2 * batch.anchors;
  launch(&clear, threads_for(space.zeroes), space.zeroed, space.zeroes);
  launch(&weigh_pairs<In, T>, warps_for(batch.anchors), batch, settings, scale, up, space.pairs, space.lists);
  launch(&allot, threads_for(batch.candidates), space.lists, batch.candidates);
  launch(&place_pairs, threads_for(pairs), space.pairs.chosen, pairs, space.lists);
  launch(&sort_pairs, threads_for(pairs), space.pairs.chosen, pairs, space.lists);
  launch(&row_gradient<In, T>, a_block_each, batch, distance, scale, up.count, space.pairs, space.lists, gradient);
}

}  // namespace triplet::gpu
