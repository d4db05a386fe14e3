// A gated residual, its layer or RMS norm and one or two modulations of it, a row at a time.
//
// In the arithmetic type (double where an argument is double, else float), per row:
//     r    = fma(gate, branch, x); x without a branch, x + branch without a gate
//     m    = sum(r) / dim;  e = sum(r - m);  mean = m + e / dim          the error of m matters where rows are far from
//     0 rstd = 1 / sqrt((sum((r - m)^2) - e * e / dim) / dim + eps);  rms: m = mean = e = 0 n    = fma((r - mean) *
//     rstd, weight, bias) y    = fma(n, 1 + scale, shift), for each modulation
// and backward, with h = (r - mean) * rstd:
//     dn = sum of grad_y * (1 + scale);  dh = dn * weight
//     dr = rstd * (dh - sum(dh) / dim - h * sum(dh * h) / dim) + grad_residual;  rms: without sum(dh)
//     grad_x = dr;  grad_branch = dr * gate;  and sums over rows (RowSums):
//     grad_gate: dr * branch;  grad_shift: grad_y;  grad_scale: grad_y * n;  grad_weight: dn * h;  grad_bias: dn
// Sums over a row: column d goes to accumulator d / lanes % 4, the accumulators and then their lanes are added
// pairwise.
#pragma once

#include <array>

#include "modulation.h"
#include "parallel.h"

namespace vqkernels::cpu {

struct NormModulateProblem {
  RowsView x;
  RowsView branch;
  RowsView gate;
  RowsView shift[2];
  RowsView scale[2];
  const void* weight;  // [dim] in the arithmetic type, null: 1
  const void* bias;    // [dim] in the arithmetic type, null: 0
  int64_t batch;
  int64_t length;
  int64_t dim;
  int modulations;  // 1 or 2
  bool rms;
  bool wide;  // the arithmetic type is double
  double eps;
};

struct NormModulateResult {
  RowsOut residual;
  RowsOut y[2];
  void* mean;  // [batch, length] in the arithmetic type; null under rms
  void* rstd;
};

enum Sum { kGate, kShift, kScale, kShift2, kScale2, kWeight, kBias, kSums };

struct NormModulateGradient {
  RowsView grad_residual;
  RowsView grad_y[2];
  const void* mean;
  const void* rstd;
  RowsOut grad_x;
  RowsOut grad_branch;
  std::array<GradientOut, kSums> sums;
};

// Rows [begin, end) of batch * length.
using NormModulateKernel = void (*)(const NormModulateProblem&, const NormModulateResult&, int64_t begin, int64_t end);
// Chunks [begin, end); partial: [chunks, kSums, dim] in the arithmetic type.
using NormModulateBackwardKernel = void (*)(const NormModulateProblem&, const NormModulateGradient&, const Chunks&,
                                            void* partial, int64_t begin, int64_t end);
// Columns [begin, end) of the sums.
using NormModulateReduceKernel = void (*)(const NormModulateProblem&, const NormModulateGradient&, const Chunks&,
                                          const void* partial, int64_t begin, int64_t end);

struct NormModulateKernels {
  NormModulateKernel forward;
  NormModulateBackwardKernel backward;
  NormModulateReduceKernel reduce;
};

extern const NormModulateKernels norm_modulate_scalar;
extern const NormModulateKernels norm_modulate_avx2;
extern const NormModulateKernels norm_modulate_avx512;

void norm_modulate(const NormModulateProblem&, const NormModulateResult&, const Parallel&);
void norm_modulate_backward(const NormModulateProblem&, const NormModulateGradient&, const Parallel&);

}  // namespace vqkernels::cpu
