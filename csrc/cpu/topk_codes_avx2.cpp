#include "simd_avx2.h"
#include "topk_codes_kernel.h"

namespace vqkernels::cpu {

void topk_codes_avx2(const NearestCodeProblem& p, const PreparedCodes* prepared, const SearchBlock& b, int64_t k,
                     void* scores, int64_t* indices) {
  topk_block<Avx2>(p, prepared, b, k, scores, indices);
}

}  // namespace vqkernels::cpu
