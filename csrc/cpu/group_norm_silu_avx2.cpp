#include "group_norm_silu_kernel.h"

namespace vqkernels::cpu {

GroupNormSiluKernels group_norm_silu_avx2() { return group_norm_silu_kernels(); }

}  // namespace vqkernels::cpu
