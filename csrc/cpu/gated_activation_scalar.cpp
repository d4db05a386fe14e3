#include "gated_activation_kernel.h"

namespace vqkernels::cpu {

const GatedActivationKernels gated_activation_scalar = {forward, backward, reduce};

}  // namespace vqkernels::cpu
