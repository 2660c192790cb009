// The CPU kernels for AVX-512, and those for processors that also multiply pairs of bfloat16.
#include "cpu/kernels.h"

#ifdef TRIPLET_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace triplet::avx512 {
constexpr int kBytes = 64, kRows = 12;
constexpr bool kBfloat16Dots = false;
#include "kernels.inc"
}  // namespace triplet::avx512
#pragma GCC pop_options

#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace triplet::avx512_bf16 {
using torch::headeronly::BFloat16;
constexpr int kBytes = 64, kRows = 12;
constexpr bool kBfloat16Dots = true;

template <typename Sums, typename Pairs>
inline Sums dot_pairs(Sums sum, Pairs a, Pairs b) {
  return (Sums)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

#include "simd.inc"
#include "geometry.inc"
#include "search.inc"
#include "mined.inc"

bool forward(const Batch<BFloat16>& batch, const Settings& settings, const Threads& threads,
             Result<BFloat16, float>& result) {
  return settings.mining == Mining::all ? avx512::forward(batch, settings, threads, result)
                                        : mined_forward(batch, settings, threads, result);
}

Kernels<BFloat16, float> kernels() { return {&forward, &avx512::backward<BFloat16, float>}; }
}  // namespace triplet::avx512_bf16
#endif
