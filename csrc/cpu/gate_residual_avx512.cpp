#include "gate_residual_kernel.h"

namespace vqkernels::cpu {

const GateResidualKernels gate_residual_avx512 = {forward, backward, reduce};

}  // namespace vqkernels::cpu
