// The kernels compiled once for each instruction set, and the choice among them at run time. Inside the regions nothing
// of the standard library is instantiated: its templates would be shared with code for older processors.
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "triplet_cpu.h"
#include "triplet_cpu_scratch.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TRIPLET_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace triplet::avx512 {
constexpr int kBytes = 64, kRows = 12;
constexpr bool kBfloat16Dots = false;
#include "triplet_cpu.inc"
}  // namespace triplet::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace triplet::avx512_bf16 {
using torch::headeronly::BFloat16;
constexpr int kBytes = 64, kRows = 12;
constexpr bool kBfloat16Dots = true;

template <typename Sums, typename Pairs>
inline Sums dot_pairs(Sums sum, Pairs a, Pairs b) {
  return (Sums)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

#include "triplet_cpu_common.inc"
#include "triplet_cpu_geometry.inc"
#include "triplet_cpu_miner.inc"
#include "triplet_cpu_mined.inc"

bool forward(const Batch<BFloat16>& batch, const Settings& settings, const Threads& threads,
             Result<BFloat16, float>& result) {
  return settings.mining == Mining::all ? avx512::forward(batch, settings, threads, result)
                                        : mined_forward(batch, settings, threads, result);
}

constexpr Kernels<BFloat16, float> table = {&forward, &avx512::backward<BFloat16, float>};
}  // namespace triplet::avx512_bf16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace triplet::avx2 {
constexpr int kBytes = 32, kRows = 6;
constexpr bool kBfloat16Dots = false;
#include "triplet_cpu.inc"
}  // namespace triplet::avx2
#pragma GCC pop_options
#endif

namespace triplet::portable {
constexpr int kBytes = 16, kRows = 4;
constexpr bool kBfloat16Dots = false;
#include "triplet_cpu.inc"
}  // namespace triplet::portable

namespace triplet {

template <typename In, typename T>
Kernels<In, T> kernels() {
#ifdef TRIPLET_X86
  // ONESHOT_ISA=avx512|avx2|portable takes a narrower set, for tests
  static const char* wanted = std::getenv("ONESHOT_ISA");
  const bool any = wanted == nullptr || *wanted == 0;
  if ((any || !std::strcmp(wanted, "avx512")) && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if constexpr (std::is_same_v<In, torch::headeronly::BFloat16>) {
      if (any && __builtin_cpu_supports("avx512bf16")) return avx512_bf16::table;
    }
    return avx512::table<In, T>;
  }
  if ((any || std::strcmp(wanted, "portable")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::table<In, T>;
  }
#endif
  return portable::table<In, T>;
}

template Kernels<float, float> kernels();
template Kernels<double, double> kernels();
template Kernels<torch::headeronly::BFloat16, float> kernels();
template Kernels<torch::headeronly::Half, float> kernels();

}  // namespace triplet
