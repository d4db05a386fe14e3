#include "bias_gelu_kernel.h"

namespace vqkernels::cpu {

const BiasGeluKernels bias_gelu_avx2 = {forward, backward, reduce};

}  // namespace vqkernels::cpu
