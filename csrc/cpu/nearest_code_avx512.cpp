#include "nearest_code_kernel.h"
#include "simd_avx512.h"

namespace vqkernels::cpu {

void nearest_code_avx512(const NearestCodeProblem& p, const PreparedCodes* prepared, const SearchBlock& b, void* scores,
                         int64_t* indices) {
  search_block<Avx512>(p, prepared, b, scores, indices);
}

void prepare_codes_avx512(const NearestCodeProblem& p, int64_t head, int64_t code_begin, int64_t code_end, void* codes,
                          void* bias) {
  prepare_block<Avx512>(p, head, code_begin, code_end, codes, bias);
}

}  // namespace vqkernels::cpu
