// Exponential moving average of code statistics, and the codebook that follows from it (Laplace-smoothed).
//
// In float, per head, w = 1 - decay:
//     cluster_size[k] = fma(w, counts[k] - cluster_size[k], cluster_size[k])
//     code_sum[k, d]  = fma(w, sums[k, d] - code_sum[k, d], code_sum[k, d])
//     n               = sum of cluster_size (column_sum of fixed_order.h), rounded to float
//     smoothed[k]     = (cluster_size[k] + eps) / (n + codes * eps) * n
//     codebook[k, d]  = code_sum[k, d] / smoothed[k]; where smoothed[k] is 0 the code stays as it is
#pragma once

#include <cstdint>

#include "../types.h"
#include "parallel.h"

namespace vqkernels::cpu {

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

// Updates the cluster sizes of one head and returns their sum n.
using UpdateSizesKernel = float (*)(const EmaUpdateProblem&, int64_t head);
// Updates code_sum and codebook of the codes [code_begin, code_end) of one head.
using UpdateCodesKernel = void (*)(const EmaUpdateProblem&, int64_t head, float n, int64_t code_begin,
                                   int64_t code_end);

float update_sizes_scalar(const EmaUpdateProblem&, int64_t head);
float update_sizes_avx2(const EmaUpdateProblem&, int64_t head);
float update_sizes_avx512(const EmaUpdateProblem&, int64_t head);
void update_codes_scalar(const EmaUpdateProblem&, int64_t head, float n, int64_t code_begin, int64_t code_end);
void update_codes_avx2(const EmaUpdateProblem&, int64_t head, float n, int64_t code_begin, int64_t code_end);
void update_codes_avx512(const EmaUpdateProblem&, int64_t head, float n, int64_t code_begin, int64_t code_end);

void ema_update(const EmaUpdateProblem& problem, const Parallel& parallel);

}  // namespace vqkernels::cpu
