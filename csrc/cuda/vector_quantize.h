// Gather, squared error and gradient of rows whose codes are known. Formulas: cpu/vector_quantize.h; bitwise the same
// results.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../types.h"

namespace vqkernels::cuda {

struct QuantizeProblem {
  const void* z;           // [heads, rows, dim]
  const void* codebook;    // [heads, codes, dim]: double for double rows, else float
  const int64_t* indices;  // [heads, rows]; outside [0, codes): the row has no code
  const bool* mask;        // [heads, rows] or null
  DType z_type;
  int64_t heads;
  int64_t rows;
  int64_t codes;
  int64_t dim;
};

// quantized: the type of z, [heads, rows, dim]; errors: workspace, float or double [heads, rows]; mse: float or double,
// 0 where no row has a code.
void vector_quantize(const QuantizeProblem& problem, void* quantized, void* errors, void* mse, int64_t* valid_rows,
                     cudaStream_t stream);

// grad_quantized (null: zero) and grad_z: the type of z, [heads, rows, dim]; grad_mse: float or double, or null.
void vector_quantize_backward(const QuantizeProblem& problem, const void* grad_quantized, const void* grad_mse,
                              const int64_t* valid_rows, Estimator estimator, void* grad_z, cudaStream_t stream);

}  // namespace vqkernels::cuda
