// The EMA of one head (formulas: ema_update.h), written once; the compiler vectorises it for each instruction set.
#pragma once

#include <cmath>

#include "ema_update.h"
#include "fixed_order.h"

namespace vqkernels::cpu {
namespace {

inline float update_sizes(const EmaUpdateProblem& p, int64_t head) {
  const float weight = static_cast<float>(1.0 - p.decay);
  float* size = p.cluster_size + head * p.codes;
  const int64_t* counts = p.counts + head * p.codes;
  for (int64_t k = 0; k < p.codes; ++k) {
    size[k] = std::fma(weight, static_cast<float>(counts[k]) - size[k], size[k]);
  }
  return static_cast<float>(column_sum(size, p.codes));
}

inline void update_codes(const EmaUpdateProblem& p, int64_t head, float n, int64_t code_begin, int64_t code_end) {
  const float weight = static_cast<float>(1.0 - p.decay);
  const float eps = static_cast<float>(p.eps);
  const float total = n + static_cast<float>(static_cast<double>(p.codes) * p.eps);
  for (int64_t k = head * p.codes + code_begin; k < head * p.codes + code_end; ++k) {
    const float smoothed = (p.cluster_size[k] + eps) / total * n;
    float* __restrict code_sum = p.code_sum + k * p.dim;
    float* __restrict code = p.codebook + k * p.dim;
    const float* __restrict sum = p.sums + k * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) {
      code_sum[d] = std::fma(weight, sum[d] - code_sum[d], code_sum[d]);
    }
    if (!(smoothed > 0)) continue;
    for (int64_t d = 0; d < p.dim; ++d) code[d] = code_sum[d] / smoothed;
  }
}

}  // namespace
}  // namespace vqkernels::cpu
