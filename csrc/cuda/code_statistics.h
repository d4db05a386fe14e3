// How many rows chose each code, and the sum of those rows. Contract: cpu/code_statistics.h; bitwise the same results.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../types.h"

namespace vqkernels::cuda {

struct CodeStatisticsProblem {
  const void* z;           // [heads, rows, dim]
  const int64_t* indices;  // [heads, rows]; outside [0, codes): the row belongs to no code
  DType z_type;
  int64_t heads;
  int64_t rows;
  int64_t codes;
  int64_t dim;
  int64_t code_pitch;  // at least codes: from the results of one head to those of the next
};

// Bytes of work memory: O(heads * (rows + codes)), and one row of sums for every kRunLength / 2 rows. Throws
// std::invalid_argument where heads * codes does not fit 32 bits.
int64_t code_statistics_workspace(const CodeStatisticsProblem& problem);

// counts: int64 [heads, code_pitch]; sums: float (double for double rows) [heads, code_pitch, dim]. What lies behind
// the codes of a head stays as it is.
void code_statistics(const CodeStatisticsProblem& problem, void* workspace, int64_t* counts, void* sums,
                     cudaStream_t stream);

}  // namespace vqkernels::cuda
