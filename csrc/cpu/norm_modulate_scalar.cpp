#include "norm_modulate_kernel.h"

namespace vqkernels::cpu {

const NormModulateKernels norm_modulate_scalar = {forward, backward, reduce};

}  // namespace vqkernels::cpu
