// A gated branch added to the residual stream.
//
// In the arithmetic type (double where an argument is double, else float), rounded once:
//     residual = fma(gate, branch, x)
//     grad_branch = grad_residual * gate;  grad_gate = sum over rows (RowSums) of grad_residual * branch
#pragma once

#include <array>

#include "modulation.h"
#include "parallel.h"

namespace vqkernels::cpu {

struct GateResidualProblem {
  RowsView x;
  RowsView branch;
  RowsView gate;
  int64_t batch;
  int64_t length;
  int64_t dim;
  bool wide;  // the arithmetic type is double
};

struct GateResidualGradient {
  RowsView grad_residual;
  RowsOut grad_branch;
  std::array<GradientOut, 1> sums;  // of the gate
};

// Rows [begin, end) of batch * length.
using GateResidualKernel = void (*)(const GateResidualProblem&, const RowsOut& residual, int64_t begin, int64_t end);
// Chunks [begin, end); partial: [chunks, dim] in the arithmetic type.
using GateResidualBackwardKernel = void (*)(const GateResidualProblem&, const GateResidualGradient&, const Chunks&,
                                            void* partial, int64_t begin, int64_t end);
// Columns [begin, end) of the sums.
using GateResidualReduceKernel = void (*)(const GateResidualProblem&, const GateResidualGradient&, const Chunks&,
                                          const void* partial, int64_t begin, int64_t end);

struct GateResidualKernels {
  GateResidualKernel forward;
  GateResidualBackwardKernel backward;
  GateResidualReduceKernel reduce;
};

extern const GateResidualKernels gate_residual_scalar;
extern const GateResidualKernels gate_residual_avx2;
extern const GateResidualKernels gate_residual_avx512;

void gate_residual(const GateResidualProblem&, const RowsOut& residual, const Parallel&);
void gate_residual_backward(const GateResidualProblem&, const GateResidualGradient&, const Parallel&);

}  // namespace vqkernels::cpu
