// Runs CUDA kernels on the CPU, compiled by g++: one block at a time, its threads as fibers. Blocks, and threads
// between two barriers, run in a random order drawn from a seed, so that a result which depends on the order shows. A
// launch throws std::runtime_error for
//   - threads of a block at different barriers, lanes of a warp at different warp operations, or some at none;
//   - shared memory (Shared, below) read or written outside its array, read before this block wrote it, or touched by
//     two threads between two barriers where one of them writes;
//   - a copy to shared memory that is touched, by any thread, before its own thread has waited for it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;  // bytes

enum class Waits { no, block, warp, never };  // never: the thread has returned

struct Thread {
  std::unique_ptr<char[]> stack{new char[kStack]};
  jmp_buf place;  // where it goes on
  bool begun = false;
  Waits waits = Waits::no;
  int line = 0;                               // of the barrier or warp operation it waits at
  int exchanges = 0;                          // warp operations so far
  char sent[2][64];                           // what it gave to the last two of them
  int votes = 0;                              // of the block so far
  int vote[2];                                // its last two
  std::vector<std::function<void()>> copies;  // that it has not waited for
};

inline std::vector<Thread> threads;
inline jmp_buf scheduler;
inline int current;                 // the thread that runs
inline int64_t epoch, block_began;  // epochs: barriers passed, in all blocks so far
inline std::string failure;
inline std::function<void()> body;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error(what + " (block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) +
                           ", thread " + std::to_string(current) + ")");
}

// From a thread to the scheduler. _setjmp and _longjmp stay in user space, where swapcontext makes a system call.
inline void wait(Waits what, int line) {
  Thread& self = threads[current];
  self.waits = what;
  self.line = line;
  if (_setjmp(self.place) == 0) _longjmp(scheduler, 1);
}

// A thread's stack serves block after block.
inline void live() {
  for (;;) {
    try {
      body();
      if (!threads[current].copies.empty()) fail("a copy is never waited for");
    } catch (const std::exception& error) {
      failure = error.what();
    }
    wait(Waits::never, 0);
  }
}

// From the scheduler to a thread, until it waits.
[[gnu::noinline]] inline void resume(int t) {
  Thread& thread = threads[t];
  current = t;
  threadIdx = dim3(unsigned(t));
  if (_setjmp(scheduler)) return;
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = thread.stack.get();
  fresh.uc_stack.ss_size = kStack;
  fresh.uc_link = nullptr;
  makecontext(&fresh, live, 0);
  setcontext(&fresh);
}

// Lets threads [begin, end) go on if all of them wait for the same thing at the same line.
inline bool release(int begin, int end, Waits what) {
  for (int t = begin; t < end; ++t) {
    if (threads[t].waits != what || threads[t].line != threads[begin].line) return false;
  }
  for (int t = begin; t < end; ++t) threads[t].waits = Waits::no;
  return true;
}

inline void run_block(int n, std::mt19937& random) {
  block_began = ++epoch;
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    for (int t : order) {
      if (threads[t].waits == Waits::no) resume(t);
      if (!failure.empty()) throw std::runtime_error(failure);
    }
    bool moved = false;
    for (int begin = 0; begin < n; begin += kWarp) moved |= release(begin, begin + kWarp, Waits::warp);
    if (moved) continue;
    if (release(0, n, Waits::never)) return;
    if (!release(0, n, Waits::block)) throw std::runtime_error("threads diverge at a barrier or a warp operation");
    ++epoch;
  }
}

// Kernel<<<grid, block>>>(arguments...) for one-dimensional blocks of whole warps, all of it done on return.
template <typename... Parameters, typename... Arguments>
void launch(unsigned seed, void (*kernel)(Parameters...), dim3 grid, unsigned block, Arguments... arguments) {
  const bool fits = block > 0 && block <= 1024 && block % kWarp == 0 && grid.y > 0 && grid.y < 65536 && grid.z == 1;
  if (!fits || grid.x == 0 || grid.x > 0x7fffffffu) throw std::runtime_error("bad launch");
  if (!failure.empty() || threads.size() < block) threads = std::vector<Thread>(block);  // fresh after a failure
  for (Thread& thread : threads) {
    thread.waits = Waits::no;
    thread.copies.clear();
  }
  failure.clear();
  std::mt19937 random(seed);
  body = [&] { kernel(arguments...); };
  blockDim = dim3(block);
  gridDim = grid;
  std::vector<int64_t> blocks(int64_t(grid.x) * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (int64_t b : blocks) {
    blockIdx = dim3(unsigned(b % grid.x), unsigned(b / grid.x));
    try {
      run_block(int(block), random);
    } catch (const std::exception& error) {
      failure = error.what();
      throw;
    }
  }
}

// Gives `value` to the lanes of the warp; returns a function from a lane to what that lane gave.
template <typename T>
auto exchange(const T& value, int line) {
  static_assert(sizeof(T) <= 64);
  const int warp = current / kWarp * kWarp, turn = threads[current].exchanges++ % 2;
  std::memcpy(threads[current].sent[turn], &value, sizeof(T));
  wait(Waits::warp, line);
  return [=](int lane) {
    T out;
    std::memcpy(&out, threads[warp + lane].sent[turn], sizeof(T));
    return out;
  };
}

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("only full warps are emulated");
}

}  // namespace simt

inline void __syncthreads(int line = __builtin_LINE()) { simt::wait(simt::Waits::block, line); }

inline int __syncthreads_or(int holds, int line = __builtin_LINE()) {
  const int turn = simt::threads[simt::current].votes++ % 2;
  simt::threads[simt::current].vote[turn] = holds;
  simt::wait(simt::Waits::block, line);
  int any = 0;
  for (unsigned t = 0; t < blockDim.x; ++t) any |= simt::threads[t].vote[turn];
  return any != 0;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  simt::check_mask(mask);
  const int lane = simt::current % simt::kWarp;
  return simt::exchange(value, line)(lane ^ lanes);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int line = __builtin_LINE()) {
  simt::check_mask(mask);
  const int lane = simt::current % simt::kWarp, from = lane - int(lanes);
  return simt::exchange(value, line)(from < 0 ? lane : from);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int line = __builtin_LINE()) {
  simt::check_mask(mask);
  return simt::exchange(value, line)(from);
}

inline unsigned __ballot_sync(unsigned mask, int holds, int line = __builtin_LINE()) {
  simt::check_mask(mask);
  const auto given = simt::exchange(holds, line);
  unsigned votes = 0;
  for (int lane = 0; lane < simt::kWarp; ++lane) votes |= unsigned(given(lane) != 0) << lane;
  return votes;
}

inline bool __any_sync(unsigned mask, int holds, int line = __builtin_LINE()) {
  return __ballot_sync(mask, holds, line) != 0;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffsll(int64_t bits) { return __builtin_ffsll(bits); }

// never fused, as the emulation is compiled without contraction
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }

inline void __threadfence() {}

// fibers do not interrupt each other, so plain code is atomic
template <typename T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}

inline uint32_t atomicOr(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at |= value;
  return before;
}

inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}

namespace triplet::gpu {

using std::fma, std::sqrt;  // of float too, as on the device

// what csrc/triplet_device.cuh defines for nvcc, every access of shared memory checked
template <typename T, int kSize>
struct Shared {
  T at[kSize];
  int64_t written[kSize], read[kSize];  // epoch of the last access
  int writer[kSize], reader[kSize];     // its thread; reader -1: several
  int64_t copied[kSize];                // epoch in which a copy to it began that is not waited for, or 0

  T get(int i) {
    check(i);
    if (written[i] < simt::block_began) simt::fail("shared memory is read before it is written");
    if (written[i] == simt::epoch && writer[i] != simt::current) simt::fail("race: a read beside a write");
    reader[i] = read[i] == simt::epoch && reader[i] != simt::current ? -1 : simt::current;
    read[i] = simt::epoch;
    return at[i];
  }
  void set(int i, T value) {
    check(i);
    if (written[i] == simt::epoch && writer[i] != simt::current) simt::fail("race: two writes");
    if (read[i] == simt::epoch && reader[i] != simt::current) simt::fail("race: a write beside a read");
    writer[i] = simt::current;
    written[i] = simt::epoch;
    at[i] = value;
  }
  void get_four(int i, T (&out)[4]) {
    if (i % 4) simt::fail("shared memory: unaligned vector");
    for (int c = 0; c < 4; ++c) out[c] = get(i + c);
  }
  // lands at once or when it is waited for, in turn: no thread may count on either
  void copy_four(int i, const T* from) {
    if (i % 4 || uintptr_t(from) % 16) simt::fail("shared memory: unaligned copy");
    for (int c = i; c < i + 4; ++c) {
      check(c);
      if (written[c] == simt::epoch && writer[c] != simt::current) simt::fail("race: a copy beside a write");
      if (read[c] == simt::epoch) simt::fail("race: a copy beside a read");
      copied[c] = simt::epoch;
    }
    const auto land = [=] { std::copy(from, from + 4, at + i); };
    auto& copies = simt::threads[simt::current].copies;
    if (copies.size() % 2) land();
    copies.push_back([=] {
      land();
      for (int c = i; c < i + 4; ++c) {
        copied[c] = 0;
        writer[c] = simt::current;
        written[c] = simt::epoch;
      }
    });
  }
  void check(int i) const {
    if (i < 0 || i >= kSize) simt::fail("shared memory: " + std::to_string(i) + " of " + std::to_string(kSize));
    if (copied[i] >= simt::block_began) simt::fail("shared memory is touched before a copy to it is waited for");
  }
};

inline void wait_for_copies() {
  for (const auto& copy : simt::threads[simt::current].copies) copy();
  simt::threads[simt::current].copies.clear();
}

inline float reciprocal(float x) {
  const float y = std::nextafter(1 / x, 0.f);
  return y < std::numeric_limits<float>::min() ? 0 : y;
}
inline double reciprocal(double x) { return 1 / x; }

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.f : 1.f;
  if (exponent == 31) return fraction ? std::numeric_limits<float>::quiet_NaN() : sign / 0.f;
  return sign * (exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}

inline uint16_t float_to_half(float value) {  // to nearest even
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7e00;
  const float size = std::fabs(value);
  if (size >= 65520.f) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);
  exponent = std::max(exponent - 1, -14);
  const int steps = int(std::nearbyint(std::ldexp(size, 10 - exponent)));  // of 2^(exponent - 10); may carry
  return sign | uint16_t(size == 0 ? 0 : steps + ((exponent + 14) << 10));
}

// acc + 8 products as tensor cores add them, by the coarsest of the published models, that of the A100: what lies
// beyond the 25th digit of the largest is cut off, and of the sum what lies beyond the 24th (Fasi et al. 2021,
// doi:10.7717/peerj-cs.330).
inline float add_cut_off(float acc, const double (&products)[8]) {
  double largest = std::fabs(acc), sum = 0;
  for (double product : products) largest = std::max(largest, std::fabs(product));
  if (!(largest > 0 && largest <= std::numeric_limits<float>::max())) return acc + float(largest);  // 0, inf, NaN
  const double unit = std::ldexp(1., std::ilogb(largest) - 24);
  for (double term : products) sum += std::trunc(term / unit);
  sum = (sum + std::trunc(acc / unit)) * unit;
  const float rounded = float(sum);
  return std::fabs(rounded) > std::fabs(sum) ? std::nextafter(rounded, 0.f) : rounded;
}

// acc (16, 8) += a (16, 16) b (8, 16)^T, spread over a warp's registers as mma.m16n8k16 has it
template <bool kBfloat16>
void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  struct Registers {
    uint32_t a[4], b[2];
  };
  const auto given = simt::exchange(Registers{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, line);
  const auto value = [](uint32_t pair, int k) {
    const uint16_t bits = uint16_t(k % 2 ? pair >> 16 : pair);
    if (!kBfloat16) return half_to_float(bits);
    const uint32_t wide = uint32_t(bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
  };
  const int lane = simt::current % simt::kWarp;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (int first = 0; first < 16; first += 8) {
      double products[8];
      for (int k = first; k < first + 8; ++k) {
        const uint32_t from_a = given(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
        const uint32_t from_b = given(column * 4 + k % 8 / 2).b[k / 8];
        products[k - first] = double(value(from_a, k)) * value(from_b, k);
      }
      acc[e] = add_cut_off(acc[e], products);
    }
  }
}

}  // namespace triplet::gpu
