#include "ema_update_kernel.h"

namespace vqkernels::cpu {

float update_sizes_scalar(const EmaUpdateProblem& p, int64_t head) { return update_sizes(p, head); }

void update_codes_scalar(const EmaUpdateProblem& p, int64_t head, float n, int64_t code_begin, int64_t code_end) {
  update_codes(p, head, n, code_begin, code_end);
}

}  // namespace vqkernels::cpu
