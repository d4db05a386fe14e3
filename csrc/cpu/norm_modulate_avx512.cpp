#include "norm_modulate_kernel.h"

namespace vqkernels::cpu {

const NormModulateKernels norm_modulate_avx512 = {forward, backward, reduce};

}  // namespace vqkernels::cpu
