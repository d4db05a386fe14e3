#include "group_norm_silu_kernel.h"

namespace vqkernels::cpu {

GroupNormSiluKernels group_norm_silu_scalar() { return group_norm_silu_kernels(); }

}  // namespace vqkernels::cpu
