// A bias and GELU.
//
// In the arithmetic type (double where an argument is double, else float), rounded once:
//     y = gelu(x + bias)
//     grad_x = grad_y * gelu'(x + bias);  grad_bias = sum over rows (RowSums) of grad_x before it is rounded
#pragma once

#include <array>

#include "activation.h"
#include "modulation.h"
#include "parallel.h"

namespace vqkernels::cpu {

struct BiasGeluProblem {
  RowsView x;
  const void* bias;  // [dim] in the arithmetic type, or null
  Activation activation;
  int64_t batch;
  int64_t length;
  int64_t dim;
  bool wide;  // the arithmetic type is double
};

struct BiasGeluGradient {
  RowsView grad_y;
  RowsOut grad_x;
  std::array<GradientOut, 1> sums;  // of the bias
};

// Rows [begin, end) of batch * length.
using BiasGeluKernel = void (*)(const BiasGeluProblem&, const RowsOut& y, int64_t begin, int64_t end);
// Chunks [begin, end); partial: [chunks, dim] in the arithmetic type.
using BiasGeluBackwardKernel = void (*)(const BiasGeluProblem&, const BiasGeluGradient&, const Chunks&, void* partial,
                                        int64_t begin, int64_t end);
// Columns [begin, end) of the sum.
using BiasGeluReduceKernel = void (*)(const BiasGeluProblem&, const BiasGeluGradient&, const Chunks&,
                                      const void* partial, int64_t begin, int64_t end);

struct BiasGeluKernels {
  BiasGeluKernel forward;
  BiasGeluBackwardKernel backward;
  BiasGeluReduceKernel reduce;
};

extern const BiasGeluKernels bias_gelu_scalar;
extern const BiasGeluKernels bias_gelu_avx2;
extern const BiasGeluKernels bias_gelu_avx512;

void bias_gelu(const BiasGeluProblem&, const RowsOut& y, const Parallel&);
void bias_gelu_backward(const BiasGeluProblem&, const BiasGeluGradient&, const Parallel&);

}  // namespace vqkernels::cpu
