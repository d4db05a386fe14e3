// A bias, and one half of each row times the activation of the other: SwiGLU and GEGLU (arXiv 2002.05202).
//
// In the arithmetic type (double where an argument is double, else float), rounded once, with x + bias = [u, g], or
// [g, u] where the first half is the gate:
//     y = u * act(g)
//     grad_u = grad_y * act(g);  grad_g = grad_y * u * act'(g)
//     grad_bias = sum over rows (RowSums) of [grad_u, grad_g] before it is rounded
#pragma once

#include <array>

#include "activation.h"
#include "modulation.h"
#include "parallel.h"

namespace vqkernels::cpu {

struct GatedActivationProblem {
  RowsView x;        // [batch, length, 2 dim]
  const void* bias;  // [2 dim] in the arithmetic type, or null
  Activation activation;
  bool first;  // the first half is the gate
  int64_t batch;
  int64_t length;
  int64_t dim;
  bool wide;  // the arithmetic type is double
};

struct GatedActivationGradient {
  RowsView grad_y;                  // [batch, length, dim]
  RowsOut grad_x;                   // [batch, length, 2 dim]
  std::array<GradientOut, 1> sums;  // of the bias
};

// Rows [begin, end) of batch * length.
using GatedActivationKernel = void (*)(const GatedActivationProblem&, const RowsOut& y, int64_t begin, int64_t end);
// Chunks [begin, end); partial: [chunks, 2 dim] in the arithmetic type.
using GatedActivationBackwardKernel = void (*)(const GatedActivationProblem&, const GatedActivationGradient&,
                                               const Chunks&, void* partial, int64_t begin, int64_t end);
// Columns [begin, end) of the sum.
using GatedActivationReduceKernel = void (*)(const GatedActivationProblem&, const GatedActivationGradient&,
                                             const Chunks&, const void* partial, int64_t begin, int64_t end);

struct GatedActivationKernels {
  GatedActivationKernel forward;
  GatedActivationBackwardKernel backward;
  GatedActivationReduceKernel reduce;
};

extern const GatedActivationKernels gated_activation_scalar;
extern const GatedActivationKernels gated_activation_avx2;
extern const GatedActivationKernels gated_activation_avx512;

void gated_activation(const GatedActivationProblem&, const RowsOut& y, const Parallel&);
void gated_activation_backward(const GatedActivationProblem&, const GatedActivationGradient&, const Parallel&);

}  // namespace vqkernels::cpu
