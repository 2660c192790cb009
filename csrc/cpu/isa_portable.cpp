// The CPU kernels for any processor: vectors of 16 bytes, which SSE2 and NEON have.
#include "cpu/kernels.h"

namespace triplet::portable {
constexpr int kBytes = 16, kRows = 4;
constexpr bool kBfloat16Dots = false;
#include "kernels.inc"
}  // namespace triplet::portable
