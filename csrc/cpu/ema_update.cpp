#include "ema_update.h"

#include "capability.h"

namespace vqkernels::cpu {
namespace {

struct Kernels {
  UpdateSizesKernel update_sizes;
  UpdateCodesKernel update_codes;
};

Kernels choose_kernels() {
  switch (capability()) {
#ifdef VQKERNELS_X86
    case Capability::avx512:
      return {update_sizes_avx512, update_codes_avx512};
    case Capability::avx2:
      return {update_sizes_avx2, update_codes_avx2};
#endif
    default:
      return {update_sizes_scalar, update_codes_scalar};
  }
}

}  // namespace

void ema_update(const EmaUpdateProblem& p, const Parallel& parallel) {
  const Kernels kernels = choose_kernels();
  for (int64_t head = 0; head < p.heads; ++head) {
    const float n = kernels.update_sizes(p, head);
    parallel.run(p.codes, [&](int64_t begin, int64_t end) { kernels.update_codes(p, head, n, begin, end); });
  }
}

}  // namespace vqkernels::cpu
