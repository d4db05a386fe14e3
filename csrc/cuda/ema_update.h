// EMA of code statistics and the codebook that follows from it. Formulas: cpu/ema_update.h; bitwise the same results.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace vqkernels::cuda {

struct EmaUpdateProblem {
  float* codebook;        // [heads, codes, dim]
  float* cluster_size;    // [heads, codes]
  float* code_sum;        // [heads, codes, dim]
  const int64_t* counts;  // [heads, codes]
  const float* sums;      // [heads, codes, dim]
  int64_t heads;
  int64_t codes;
  int64_t dim;
  double decay;
  double eps;
};

// totals: workspace, float [heads].
void ema_update(const EmaUpdateProblem& problem, float* totals, cudaStream_t stream);

}  // namespace vqkernels::cuda
