// The choice of the kernels' instruction set, at run time.
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "triplet_cpu_sets.h"

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
      if (any && __builtin_cpu_supports("avx512bf16")) return avx512_bf16::kernels();
    }
    return avx512::kernels<In, T>();
  }
  if ((any || std::strcmp(wanted, "portable")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::kernels<In, T>();
  }
#endif
  return portable::kernels<In, T>();
}

template Kernels<float, float> kernels();
template Kernels<double, double> kernels();
template Kernels<torch::headeronly::BFloat16, float> kernels();
template Kernels<torch::headeronly::Half, float> kernels();

}  // namespace triplet
