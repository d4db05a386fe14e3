#include "code_statistics_kernel.h"

namespace vqkernels::cpu {

void sum_members_avx2(const void* z, DType z_type, const int64_t* order, const int64_t* offsets, int64_t code_begin,
                      int64_t code_end, int64_t dim, void* sums) {
  sum_members(z, z_type, order, offsets, code_begin, code_end, dim, sums);
}

}  // namespace vqkernels::cpu
