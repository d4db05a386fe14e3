// Normalisation and rotation of queries or keys x [batch, length, heads, dim], and their gradients.
//
// Forward, in float (double for double), over the dim numbers of a head or over all heads of a position:
//     n = (x - mean) * r      r: 1 / sqrt(mean(x^2) + eps), 1 / max(|x|, eps) or 1 / sqrt(var(x) + eps)
//     y = n * weight + bias
//     (y_i, y_j) <- (y_i cos - y_j sin, y_j cos + y_i sin), no product contracted
// l2 divides by max(|x|, eps). Where `factor` is given it replaces r (l2: the divisor), and n and n * weight are
// rounded to the type of x.
//
// Backward, g the gradient of y, the rotation undone, N the count of numbers that share a norm:
//     grad_bias = sum g,  grad_weight = sum g n,  h = g weight
//     grad_x = r (h - mean(h) - n sum(h n) / N)   (layer; rms: without mean(h); l2: n sum(h n), 0 where |x| < eps)
// Gradients of parameters are summed over runs of positions in float, runs and chunks of positions in double, all in
// ascending order; a chunk depends on the sizes alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../types.h"
#include "parallel.h"

namespace vqkernels::cpu {

enum class HeadNorm { none, rms, layer, l2 };

// Of a tensor [batch, length, heads, dim] whose last stride is 1, in elements.
struct HeadStrides {
  int64_t batch;
  int64_t position;
  int64_t head;
};

// A parameter [heads, dim] or [1, dim], contiguous. heads is 0 where there is none.
struct HeadParameter {
  const void* data = nullptr;
  int64_t heads = 0;
};

struct QkNormRopeProblem {
  const void* x;
  HeadStrides x_strides;
  HeadParameter weight;
  HeadParameter bias;
  const void* cos;  // [batch or 1, length, pairs], rows contiguous
  const void* sin;
  int64_t table_batch_stride;
  int64_t table_position_stride;
  int64_t pairs;       // 0: no rotation
  const void* factor;  // [batch, length, heads or (across heads) 1], or null
  DType type;
  HeadNorm norm;
  bool across_heads;
  bool interleaved;
  double eps;
  int64_t batch;
  int64_t length;
  int64_t heads;
  int64_t dim;

  int64_t rows() const { return batch * length; }
  int64_t chunk_rows() const { return std::max<int64_t>(16, (rows() + 63) / 64); }
  int64_t chunks() const { return (rows() + chunk_rows() - 1) / chunk_rows(); }
};

struct QkNormRopeGradients {
  const void* grad;
  HeadStrides grad_strides;
  void* grad_x;
  HeadStrides grad_x_strides;
  double* weight_sums;  // [chunks, weight.heads, dim]
  double* bias_sums;    // [chunks, bias.heads, dim]
};

// Rows are positions of the batch, batch * length of them.
using QkNormRopeKernel = void (*)(const QkNormRopeProblem&, void* out, const HeadStrides& out_strides,
                                  int64_t row_begin, int64_t row_end);
using QkNormRopeBackwardKernel = void (*)(const QkNormRopeProblem&, const QkNormRopeGradients&, int64_t chunk_begin,
                                          int64_t chunk_end);

void qk_norm_rope_scalar(const QkNormRopeProblem&, void*, const HeadStrides&, int64_t row_begin, int64_t row_end);
void qk_norm_rope_avx2(const QkNormRopeProblem&, void*, const HeadStrides&, int64_t row_begin, int64_t row_end);
void qk_norm_rope_avx512(const QkNormRopeProblem&, void*, const HeadStrides&, int64_t row_begin, int64_t row_end);
void qk_norm_rope_backward_scalar(const QkNormRopeProblem&, const QkNormRopeGradients&, int64_t chunk_begin,
                                  int64_t chunk_end);
void qk_norm_rope_backward_avx2(const QkNormRopeProblem&, const QkNormRopeGradients&, int64_t chunk_begin,
                                int64_t chunk_end);
void qk_norm_rope_backward_avx512(const QkNormRopeProblem&, const QkNormRopeGradients&, int64_t chunk_begin,
                                  int64_t chunk_end);

void qk_norm_rope(const QkNormRopeProblem& problem, void* out, const HeadStrides& out_strides,
                  const Parallel& parallel);

// grad_weight and grad_bias: [heads or 1, dim] of the type of the arithmetic, written where the parameter is given.
void qk_norm_rope_backward(const QkNormRopeProblem& problem, const QkNormRopeGradients& gradients, void* grad_weight,
                           void* grad_bias, const Parallel& parallel);

}  // namespace vqkernels::cpu
