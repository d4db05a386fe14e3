#include "gate_residual_kernel.h"

namespace vqkernels::cpu {

const GateResidualKernels gate_residual_avx2 = {forward, backward, reduce};

}  // namespace vqkernels::cpu
