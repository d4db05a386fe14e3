#include "gated_activation_kernel.h"

namespace vqkernels::cpu {

const GatedActivationKernels gated_activation_avx2 = {forward, backward, reduce};

}  // namespace vqkernels::cpu
