#include "qk_norm_rope_kernel.h"

namespace vqkernels::cpu {

void qk_norm_rope_avx2(const QkNormRopeProblem& p, void* out, const HeadStrides& out_strides, int64_t row_begin,
                       int64_t row_end) {
  forward_rows(p, out, out_strides, row_begin, row_end);
}

void qk_norm_rope_backward_avx2(const QkNormRopeProblem& p, const QkNormRopeGradients& g, int64_t chunk_begin,
                                int64_t chunk_end) {
  backward_chunks(p, g, chunk_begin, chunk_end);
}

}  // namespace vqkernels::cpu
