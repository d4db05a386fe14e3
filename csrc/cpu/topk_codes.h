// The k codes of the largest scores of every row, in descending order, among equal scores in ascending order of their
// indices. Scores and validity are those of nearest_code.h. Where a row has fewer valid codes than k, or is masked or
// invalid, the rest is index -1 with score -Inf.
#pragma once

#include <cstdint>

#include "nearest_code.h"
#include "parallel.h"

namespace vqkernels::cpu {

// Writes scores (float, or double for double inputs) and indices [rows, k] of a block of rows that meets all codes.
// Rows are not masked here. Without `prepared` the kernel prepares codes itself.
using TopkCodesKernel = void (*)(const NearestCodeProblem&, const PreparedCodes* prepared, const SearchBlock&,
                                 int64_t k, void* scores, int64_t* indices);

void topk_codes_scalar(const NearestCodeProblem&, const PreparedCodes*, const SearchBlock&, int64_t, void*, int64_t*);
void topk_codes_avx2(const NearestCodeProblem&, const PreparedCodes*, const SearchBlock&, int64_t, void*, int64_t*);
void topk_codes_avx512(const NearestCodeProblem&, const PreparedCodes*, const SearchBlock&, int64_t, void*, int64_t*);

// scores: float or double [heads, rows, k]; indices: int64 [heads, rows, k]. Work memory: a block of rows and one of
// codes a thread, a bias a code, and a copy of the codebook where it is not float or is normalised. Bitwise the same
// for any number of threads.
void topk_codes(const NearestCodeProblem& problem, int64_t k, void* scores, int64_t* indices, const Parallel& parallel);

}  // namespace vqkernels::cpu
