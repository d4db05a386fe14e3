#include "vector_quantize_kernel.h"

namespace vqkernels::cpu {

void quantize_rows_avx2(const QuantizeRows& p, void* quantized, void* errors) {
  quantize_rows_any(p, quantized, errors);
}

void quantize_rows_backward_avx2(const QuantizeRows& p, const void* grad_quantized, Estimator estimator,
                                 double coefficient, void* grad_z) {
  quantize_rows_backward_any(p, grad_quantized, estimator, coefficient, grad_z);
}

}  // namespace vqkernels::cpu
