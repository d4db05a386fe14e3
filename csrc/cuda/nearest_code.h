// Nearest-codebook search. Contract: cpu/nearest_code.h; bitwise the same results.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../types.h"

namespace vqkernels::cuda {

struct NearestCodeProblem {
  const void* z;         // [heads, rows, dim]
  const void* codebook;  // [heads, codes, dim]
  const bool* mask;      // [heads, rows] or null; false: index -1
  DType type;            // of z and codebook: float32 or float64
  Metric metric;
  int64_t heads;
  int64_t rows;
  int64_t codes;
  int64_t dim;
};

// Bytes of work memory on the current device: O(rows + heads * codes), for cosine also a copy of the codebook.
int64_t nearest_code_workspace(const NearestCodeProblem& problem);

// scores: float or double [heads, rows], -Inf where the index is -1; indices: int64 [heads, rows].
void nearest_code(const NearestCodeProblem& problem, void* workspace, void* scores, int64_t* indices,
                  cudaStream_t stream);

}  // namespace vqkernels::cuda
