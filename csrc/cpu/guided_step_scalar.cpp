#include "guided_step_kernel.h"

namespace vqkernels::cpu {

void guided_step_scalar(const GuidedStepProblem& p, int64_t row, int64_t begin, int64_t end, void* next) {
  any_step_row(p, row, begin, end, next);
}

}  // namespace vqkernels::cpu
