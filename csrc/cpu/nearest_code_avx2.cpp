#include "nearest_code_kernel.h"
#include "simd_avx2.h"

namespace vqkernels::cpu {

void nearest_code_avx2(const NearestCodeProblem& p, const SearchBlock& b, void* scores, int64_t* indices) {
  search_block<Avx2>(p, b, scores, indices);
}

}  // namespace vqkernels::cpu
