#include "guided_step.h"

#include <algorithm>

#include "capability.h"

namespace vqkernels::cpu {
namespace {

// What a thread takes at a time.
constexpr int64_t kPart = 1 << 14;

GuidedStepKernel choose_kernel() {
  switch (capability()) {
#ifdef VQKERNELS_X86
    case Capability::avx512:
      return guided_step_avx512;
    case Capability::avx2:
      return guided_step_avx2;
#endif
    default:
      return guided_step_scalar;
  }
}

}  // namespace

void guided_step(const GuidedStepProblem& p, void* next, const Parallel& parallel) {
  const GuidedStepKernel kernel = choose_kernel();
  const int64_t parts = (p.size + kPart - 1) / kPart;
  parallel.run(p.rows * parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % parts * kPart;
      kernel(p, i / parts, first, std::min(p.size, first + kPart), next);
    }
  });
}

}  // namespace vqkernels::cpu
