// How many rows chose each code, and the sum of those rows.
//
// The members of a code are taken in ascending row order in runs of kRunLength. A run is added up one after the
// other in float, the runs one after the other in double, and the result is rounded once. (Double rows: all in
// double.) Rows with index -1 belong to no code.
#pragma once

#include <cstdint>

#include "../types.h"
#include "parallel.h"

namespace vqkernels::cpu {

struct CodeStatisticsProblem {
  const void* z;           // [heads, rows, dim]
  const int64_t* indices;  // [heads, rows], -1 or a code
  DType z_type;
  int64_t heads;
  int64_t rows;
  int64_t codes;
  int64_t dim;
};

// Sums of the codes [code_begin, code_end) of one head. Members of code k: order[offsets[k] .. offsets[k + 1]).
using SumMembersKernel = void (*)(const void* z, DType z_type, const int64_t* order, const int64_t* offsets,
                                  int64_t code_begin, int64_t code_end, int64_t dim, void* sums);

void sum_members_scalar(const void*, DType, const int64_t*, const int64_t*, int64_t, int64_t, int64_t, void*);
void sum_members_avx2(const void*, DType, const int64_t*, const int64_t*, int64_t, int64_t, int64_t, void*);
void sum_members_avx512(const void*, DType, const int64_t*, const int64_t*, int64_t, int64_t, int64_t, void*);

// counts int64 [heads, codes]; sums float (double for double rows) [heads, codes, dim]. Throws
// std::out_of_range, before writing a sum, where an index is neither -1 nor below codes.
void code_statistics(const CodeStatisticsProblem& problem, int64_t* counts, void* sums, const Parallel& parallel);

}  // namespace vqkernels::cpu
