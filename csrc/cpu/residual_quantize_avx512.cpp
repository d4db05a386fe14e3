#include "residual_quantize_kernel.h"

namespace vqkernels::cpu {

void residual_step_avx512(const ResidualStep& p) { residual_step_any(p); }

void residual_backward_avx512(const ResidualRows& p, const void* grad_quantized, Estimator estimator,
                              const double* coefficients, void* grad_z) {
  residual_backward_any(p, grad_quantized, estimator, coefficients, grad_z);
}

}  // namespace vqkernels::cpu
