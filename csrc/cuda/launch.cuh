// The kernels in their order, for a `launch(kernel, blocks, arguments...)` that runs them one after another, with
// kThreads threads a block: on a stream by op.cu, under emulation by the tests.
#pragma once

#include <limits>

#include "cuda/mined.cuh"
#include "cuda/prepare.cuh"
#include "cuda/pull.cuh"
#include "cuda/search_mma.cuh"
#include "cuda/search_simt.cuh"

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

// What an op keeps of a batch. `slots` winners of each anchor are searched for; gradients of the first `gradient_rows`
// candidates are made of mined pairs. 0: none.
template <typename T>
struct Workspace {
  Prepared<T> prepared;
  Winners winners;
  Pairs<T> pairs;
  Lists lists;
  Total* totals;
  int* done;
  int64_t* count;
  Key* zeroed;  // the first `zeroes` keys of the allocation start as 0
  int64_t zeroes;

  template <typename In>
  Workspace(const Batch<In>& batch, int slots, int gradient_rows, Arena& arena) {
    const int64_t anchors = batch.anchors, pair_count = slots || gradient_rows ? 2 * anchors : 0;
    zeroed = arena.take<Key>(0);
    done = arena.take<int>(1);
    lists.chosen_by = arena.take<int>(gradient_rows);
    winners.kept = arena.take<Key>(slots * anchors * kKept);
    winners.bounds = arena.take<uint32_t>(slots * anchors);
    zeroes = arena.used / int64_t(sizeof(Key));
    winners.anchors = batch.anchors;
    winners.limits = arena.take<float>(slots == kSlots ? anchors : 0);
    winners.decisive_limits = arena.take<double>(slots == kSlots ? anchors : 0);
    prepared.filters.words = slots ? arena.take<uint32_t>(int64_t(batch.groups()) * kThreads) : nullptr;
    prepared.flags = arena.take<int>(batch.groups());
    prepared.groups = batch.groups();
    prepared.shift = arena.take<T>(parts_of(batch.width, 4) * 4);
    prepared.scale = arena.take<T>(batch.candidates);
    prepared.norms = arena.take<T>(batch.candidates);
    pairs.pulls = arena.take<Pull<T>>(pair_count);
    pairs.chosen = arena.take<int>(pair_count);
    lists.pairs = arena.take<int>(int64_t(gradient_rows) * kListed);
    lists.rows = gradient_rows;
    totals = arena.take<Total>(slots ? parts_of(anchors, kWarps) : anchors);
    count = arena.take<int64_t>(1);
  }
};

// Properties of the device on which the choice of kernels depends.
struct Machine {
  int processors;     // streaming multiprocessors
  bool tensor_cores;  // mma m16n8k16 of halves: compute capability 8.0 and above
};

template <typename In>
dim3 tiles_of(const Batch<In>& batch, int64_t size) {
  const int64_t own = parts_of(batch.anchors, size), others = parts_of(batch.candidates - batch.anchors, size);
  const int64_t tiles = own * (own + 1) / 2 + own * others;
  require(tiles <= std::numeric_limits<int32_t>::max(), "too many rows for the CUDA op: ", batch.anchors, " and ",
          batch.candidates - batch.anchors, " others");
  return dim3(unsigned(tiles));
}

// What tensor cores are given of rows of a type for cosine; for the other distances always split numbers.
template <typename In>
constexpr Numbers kNumbersOf = std::is_same_v<In, Bfloat16>  ? Numbers::bfloat16
                               : std::is_same_v<In, Float16> ? Numbers::float16
                                                             : Numbers::split;

// Tiles of a round of mining "all".
template <typename In>
dim3 tiles_of_round(const Batch<In>& batch, int anchors, int64_t size) {
  const int64_t across = parts_of(batch.anchors, size) + parts_of(batch.candidates - batch.anchors, size);
  return dim3(unsigned(parts_of(anchors, size) * across));
}

inline int anchors_at_once(int anchors) { return anchors < kAnchorsAtOnce ? anchors : kAnchorsAtOnce; }

// What tensor cores are given, if they serve: their tiles are large, and have to fill the device. (For "all" half of
// it: the tiles that would else do the work are not large.)
template <typename In>
Numbers numbers_of(const Machine& machine, const Batch<In>& batch, const Settings& settings) {
  const unsigned tiles = settings.mining == Mining::all
                             ? 2 * tiles_of_round(batch, anchors_at_once(batch.anchors), 128).x
                             : tiles_of(batch, 128).x;
  const bool serve = machine.tensor_cores && sizeof(In) <= 4 && tiles >= unsigned(machine.processors);
  if (!serve) return Numbers::none;
  return settings.distance == Distance::cosine ? kNumbersOf<In> : Numbers::split;
}

template <typename In>
Panels make_panels(const Batch<In>& batch, Numbers numbers, Arena& arena) {
  Panels panels{numbers};
  if (numbers == Numbers::none) return panels;
  panels.own = int(parts_of(batch.anchors, 16));
  panels.blocks = panels.own + int(parts_of(batch.candidates - batch.anchors, 16));
  panels.steps = int(parts_of(batch.width, 32)) * 2;
  const int64_t words = int64_t(panels.blocks) * panels.steps * 128;
  panels.high = arena.take<uint32_t>(words);
  panels.low = arena.take<uint32_t>(numbers == Numbers::split ? words : 0);
  panels.rests = arena.take<float>(batch.candidates);
  return panels;
}

// What a pass needs only while it runs. `gradient_rows`: of a backward pass; 0: of the forward pass.
template <typename T>
struct Scratch {
  Panels panels{Numbers::none};
  Round<T> round;

  template <typename In>
  Scratch(const Batch<In>& batch, const Settings& settings, const Machine& machine, int gradient_rows, Arena& arena) {
    const bool all = settings.mining == Mining::all;
    if (all || !gradient_rows) panels = make_panels(batch, numbers_of(machine, batch, settings), arena);
    const int64_t pairs = all ? int64_t(anchors_at_once(batch.anchors)) * batch.candidates : 0;
    const int64_t rows = all ? gradient_rows : 0, parts = rows ? slices_of(batch.candidates) * kAnchorsAtOnce : 0;
    round.distances = arena.take<T>(pairs);
    round.factors = arena.take<T>(rows ? pairs : 0);
    round.sums = arena.take<T>(rows * batch.width);
    round.parts = arena.take<T>(parts * batch.width);
    round.ended = arena.take<int>(rows ? tiles_of_sums(kAnchorsAtOnce, batch.width) : 0);
  }
};

// The bytes that a workspace takes.
template <typename Space, typename... Arguments>
int64_t bytes_of(Arguments... arguments) {
  Arena arena{nullptr};
  Space(arguments..., arena);
  return arena.used;
}

// One warp for each of `count`.
inline dim3 warps_for(int64_t count) { return dim3(unsigned(parts_of(count, kWarps))); }

// How far rounding moves the order of a search, as multiples of the unit of its arithmetic. A product's sum of D terms
// is off by D units of |x| |y|; on tensor cores, which cut off digits, by 1.6 D + 25, as 16 terms and what they are
// added to may lose 26 units. Rows that are split in two lose 12 more: the product of what is left, 2^-11 of either
// row, and what two halves do not hold, 2^-22. The rest: rows as the search sees them, norms, `decisive`, and the
// search's own sums, which are of float32 for doubles too.
template <typename T>
Rounding rounding_of(Distance distance, int width, Numbers numbers) {
  const double unit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
  const double terms =
      numbers == Numbers::none ? 1.3 * width + 96 : 2. * width + (numbers == Numbers::split ? 144 : 128);
  const float slack = float(terms * unit + (sizeof(T) == 8 ? 8 * 0x1p-24 : 0));
  if (distance == Distance::cosine) return {0, 0, 2 * slack};
  return {slack, float(2 * width * 0x1p-126), 0};  // least: products too small for float32
}

// One pass over all pairs: large tiles where they fill the device, on tensor cores where these serve; else small ones.
template <bool kBeyond, typename Launch, typename In, typename T>
void search(Launch& launch, const Machine& machine, const Batch<In>& batch, const Workspace<T>& work,
            const Panels& panels, Pass pass) {
  const dim3 large = tiles_of(batch, 128);
  if constexpr (sizeof(T) == 4) {
    const Batch<float> rows{nullptr, batch.labels, batch.anchors, batch.candidates, batch.width, false};
    const auto on_tensor_cores = [&](auto kernel) {
      launch(kernel, large, rows, work.prepared, panels, work.winners, pass);
    };
    if (panels.numbers == Numbers::bfloat16) return on_tensor_cores(&search_pairs_mma<Numbers::bfloat16, kBeyond>);
    if (panels.numbers == Numbers::float16) return on_tensor_cores(&search_pairs_mma<Numbers::float16, kBeyond>);
    if (panels.numbers == Numbers::split) return on_tensor_cores(&search_pairs_mma<Numbers::split, kBeyond>);
  }
  const auto run = [&](auto kernel, dim3 tiles) { launch(kernel, tiles, batch, work.prepared, work.winners, pass); };
  if constexpr (sizeof(T) == 4) {
    if (large.x >= unsigned(machine.processors)) return run(&search_pairs<In, T, 8, kBeyond>, large);
  }
  run(&search_pairs<In, T, 4, kBeyond>, tiles_of(batch, 64));
}

template <typename T, typename Launch, typename In>
void prepare(Launch& launch, const Batch<In>& batch, const Settings& settings, const Workspace<T>& work,
             const Panels& panels, bool measured) {
  launch(&prepare_rows<In, T>, dim3(unsigned(batch.groups())), batch, settings.distance, work.prepared, panels,
         work.zeroed, work.zeroes, measured);
}

// f(round) for the anchors of mining "all", kAnchorsAtOnce at a time, when their distances are there.
template <typename T, typename Launch, typename In, typename F>
void for_each_round(Launch& launch, const Batch<In>& batch, const Settings& settings, const Workspace<T>& work,
                    const Scratch<T>& scratch, F&& f) {
  Round<T> round = scratch.round;
  for (round.first = 0; round.first < batch.anchors; round.first += kAnchorsAtOnce) {
    round.anchors = anchors_at_once(batch.anchors - round.first);
    const auto on_tensor_cores = [&](auto kernel) {
      launch(kernel, tiles_of_round(batch, round.anchors, 128), batch, settings.distance, work.prepared, scratch.panels,
             round);
    };
    if (scratch.panels.numbers == Numbers::none) {
      launch(&measure_pairs<In, T>, tiles_of_round(batch, round.anchors, 64), batch, settings.distance, work.prepared,
             round);
    } else if constexpr (sizeof(T) == 4) {
      if (scratch.panels.numbers == Numbers::split) {
        on_tensor_cores(&measure_pairs_mma<Numbers::split, In>);
      } else if constexpr (sizeof(In) == 2) {
        on_tensor_cores(&measure_pairs_mma<kNumbersOf<In>, In>);
      }
    }
    f(round);
  }
}

// The loss into `out`; and into `work` what the gradients need of it.
template <typename T, typename Launch, typename In>
void forward(Launch& launch, const Machine& machine, const Batch<In>& batch, const Settings& settings,
             Workspace<T>& work, const Scratch<T>& scratch, Outputs<T> out) {
  const bool semihard = settings.mining == Mining::semihard;
  const Distance distance = settings.distance;
  const Panels& panels = scratch.panels;
  work.winners.rounding = rounding_of<T>(distance, batch.width, panels.numbers);
  out.totals = work.totals;
  out.done = work.done;
  prepare(launch, batch, settings, work, panels, true);
  if (settings.mining == Mining::all) {
    for_each_round(launch, batch, settings, work, scratch, [&](const Round<T>& round) {
      launch(&sum_triplets<In, T>, dim3(unsigned(round.anchors)), batch, settings, work.prepared, round, out);
    });
    return;
  }
  search<false>(launch, machine, batch, work, panels, {!semihard});
  if (semihard) {
    launch(&choose_positives<In, T>, warps_for(batch.anchors), batch, distance, work.prepared, work.winners,
           work.pairs.chosen);
    search<true>(launch, machine, batch, work, panels, {true});
  }
  launch(&finish<In, T>, warps_for(batch.anchors), batch, settings, work.prepared, work.winners, work.pairs, work.lists,
         out);
}

// Into `work` what the gradients of mined pairs need, after a forward pass whose workspace is gone.
template <typename T, typename Launch, typename In>
void recompute(Launch& launch, const Batch<In>& batch, const Settings& settings, const Workspace<T>& work,
               const int64_t* positive, const int64_t* negative) {
  if (settings.mining == Mining::all) return;
  prepare(launch, batch, settings, work, Panels{}, settings.distance == Distance::cosine);
  launch(&weigh_pairs<In, T>, warps_for(batch.anchors), batch, settings, work.prepared.scale, positive, negative,
         work.pairs, work.lists);
}

// The gradients (gradient_rows, width) of the first candidates.
template <typename T, typename Launch, typename In>
void backward(Launch& launch, const Batch<In>& batch, const Settings& settings, const Workspace<T>& work,
              const Scratch<T>& scratch, const Upstream<T>& up, In* gradient, int gradient_rows) {
  const Distance distance = settings.distance;
  const T* scale = work.prepared.scale;
  if (settings.mining != Mining::all) {
    launch(&row_gradient<In, T>, warps_for(gradient_rows), batch, settings, scale, up, work.pairs, work.lists,
           gradient);
    return;
  }
  prepare(launch, batch, settings, work, scratch.panels, true);
  for_each_round(launch, batch, settings, work, scratch, [&](const Round<T>& round) {
    launch(&weigh_triplets<In, T>, dim3(unsigned(round.anchors)), batch, settings, up, round);
    const int64_t parts = tiles_of_sums(gradient_rows, batch.width) +
                          tiles_of_sums(round.anchors, batch.width) * (slices_of(batch.candidates) - 1);
    launch(&pull_rows<In, T>, dim3(unsigned(parts)), batch, distance, scale, round, gradient_rows);
  });
  launch(&finish_gradient<In, T>, warps_for(gradient_rows), batch, distance, scale, up.count, scratch.round.sums,
         gradient, gradient_rows);
}

// f(kernel) for all kernels that may be launched for rows of a type.
template <typename In, typename F>
void for_each_kernel(F&& f) {
  using T = decltype(widen(In()));
  f(&prepare_rows<In, T>);
  f(&search_pairs<In, T, 4, false>);
  f(&search_pairs<In, T, 4, true>);
  if constexpr (sizeof(T) == 4) {
    f(&search_pairs<In, T, 8, false>);
    f(&search_pairs<In, T, 8, true>);
  }
  if constexpr (sizeof(T) == 4) {
    f(&search_pairs_mma<kNumbersOf<In>, false>);
    f(&search_pairs_mma<kNumbersOf<In>, true>);
    f(&measure_pairs_mma<kNumbersOf<In>, In>);
  }
  if constexpr (sizeof(In) == 2) f(&measure_pairs_mma<Numbers::split, In>);
  f(&choose_positives<In, T>);
  f(&finish<In, T>);
  f(&weigh_pairs<In, T>);
  f(&row_gradient<In, T>);
  f(&measure_pairs<In, T>);
  f(&sum_triplets<In, T>);
  f(&weigh_triplets<In, T>);
  f(&pull_rows<In, T>);
  f(&finish_gradient<In, T>);
}

}  // namespace triplet::gpu
