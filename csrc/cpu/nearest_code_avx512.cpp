#include "nearest_code_kernel.h"
#include "simd_avx512.h"

namespace vqkernels::cpu {

void nearest_code_avx512(const NearestCodeProblem& p, const SearchBlock& b, void* scores, int64_t* indices) {
  search_block<Avx512>(p, b, scores, indices);
}

}  // namespace vqkernels::cpu
