// The CPU kernels for AVX2.
#include "cpu/kernels.h"

#ifdef TRIPLET_X86
#pragma GCC target("avx2,fma,f16c")
namespace triplet::avx2 {
constexpr int kBytes = 32, kRows = 6;
constexpr bool kBfloat16Dots = false;
#include "kernels.inc"
}  // namespace triplet::avx2
#endif
