// The k best codes of every row. Contract: cpu/topk_codes.h; bitwise the same results.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "nearest_code.h"

namespace vqkernels::cuda {

// Bytes of work memory: O(rows + heads * codes), for cosine also a copy of the codebook.
int64_t topk_codes_workspace(const NearestCodeProblem& problem);

// scores: float or double [heads, rows, k], in descending order; indices: int64 [heads, rows, k], ascending among equal
// scores; -Inf and -1 where there is no code. Throws std::invalid_argument for more than 2^30 codes.
void topk_codes(const NearestCodeProblem& problem, int64_t k, void* workspace, void* scores, int64_t* indices,
                cudaStream_t stream);

}  // namespace vqkernels::cuda
