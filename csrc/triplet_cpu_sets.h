// The instruction sets that the CPU kernels are compiled for, each in a file of its own, triplet_cpu_<set>.cpp, between
// pragmas that allow them. There nothing of the standard library is instantiated: its templates would be shared with
// code for older processors.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "triplet_cpu.h"
#include "triplet_cpu_scratch.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TRIPLET_X86
#endif

namespace triplet {

namespace avx512 {
template <typename In, typename T>
Kernels<In, T> kernels();
}

namespace avx512_bf16 {
Kernels<torch::headeronly::BFloat16, float> kernels();
}

namespace avx2 {
template <typename In, typename T>
Kernels<In, T> kernels();
}

namespace portable {
template <typename In, typename T>
Kernels<In, T> kernels();
}

}  // namespace triplet
