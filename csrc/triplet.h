// What the backends share: the codes of triplet.py's options, the cost of a triplet, checks of the arguments. No
// PyTorch headers here, so that kernels can be compiled without them.
#pragma once

#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define TRIPLET_HD __host__ __device__
#else
#define TRIPLET_HD
#endif

// arguments in the schemas of the ops
#define TRIPLET_BATCH "Tensor candidates, Tensor labels, "
#define TRIPLET_OPTIONS                                                                              \
  "SymInt anchors, SymInt gradient_rows, int distance, int mining, bool soft_margin, float margin, " \
  "float temperature, int reduction) -> "

namespace triplet {

// the position of a name in DISTANCES, MININGS and REDUCTIONS of triplet.py
enum class Distance : int64_t { cosine, euclidean, sqeuclidean };
enum class Mining : int64_t { hard, semihard, all };
enum class Reduction : int64_t { none, mean, sum };

struct Settings {
  Distance distance;
  Mining mining;
  bool soft_margin;
  double margin;
  double temperature;
  Reduction reduction;
};

// loss of a triplet, of gap = d_ap - d_an
template <typename T>
TRIPLET_HD inline T cost(T gap, const Settings& settings) {
  if (settings.soft_margin) {
    const T x = gap / T(settings.temperature);
    return (x > 0 ? x : T(0)) + std::log1p(std::exp(x > 0 ? -x : x));
  }
  const T loss = gap + T(settings.margin);
  return loss < 0 ? T(0) : loss;  // NaN stays
}

// its derivative by the gap
template <typename T>
TRIPLET_HD inline T cost_slope(T gap, const Settings& settings) {
  if (settings.soft_margin) {
    return T(1) / (T(settings.temperature) * (1 + std::exp(-gap / T(settings.temperature))));
  }
  return gap + T(settings.margin) > 0 ? T(1) : T(0);
}

// std::invalid_argument reaches Python as ValueError
template <typename... Parts>
inline void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline Settings make_settings(int64_t distance, int64_t mining, bool soft_margin, double margin, double temperature,
                              int64_t reduction) {
  require(distance >= 0 && distance <= 2, "distance must be a code of 0..2, got ", distance);
  require(mining >= 0 && mining <= 2, "mining must be a code of 0..2, got ", mining);
  require(reduction >= 0 && reduction <= 2, "reduction must be a code of 0..2, got ", reduction);
  require(temperature > 0, "temperature must be above 0, got ", temperature);
  return {Distance(distance), Mining(mining), soft_margin, margin, temperature, Reduction(reduction)};
}

}  // namespace triplet
