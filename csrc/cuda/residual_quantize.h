// Residual quantization: all levels of a row by one kernel, its gradient, and the statistics of every level.
//
// In float (double for double rows), r_0 = z: level q takes the nearest code c of r_q (cpu/nearest_code.h) and leaves
// r_{q+1} = r_q - c. The quantized row is ((c_0 + c_1) + c_2) + ..., rounded once to the type of z. A level has index
// -1 where the row is masked, the level does not run, or no code was found; then all later levels have index -1 too. A
// row that lacks a code at a level that should have run is NaN, one for which no level runs is 0. Errors and gradients
// of a level are those of cpu/vector_quantize.h for the row r_q; a row's gradient is the sum of its levels, in their
// order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../types.h"

namespace vqkernels::cuda {

// Travels as a kernel's parameter, so that no list of sizes has to be copied to the device.
constexpr int64_t kMaxLevels = 256;

struct Levels {
  int64_t count;
  int64_t begin[kMaxLevels + 1];  // of a level's codes among those of all levels; begin[count]: of how many
};

// Throws std::invalid_argument for more than kMaxLevels levels, or a level that has not 1 to 2^30 codes.
Levels make_levels(const int64_t* sizes, int64_t count);

struct ResidualProblem {
  const void* z;              // [heads, rows, dim]
  const void* codebooks;      // [heads, codes of all levels, dim]: double for double rows, else float
  const bool* mask;           // [heads, rows] or null; false: no level runs
  const int64_t* num_levels;  // [heads, rows] or null: all levels run; level q runs where q is below
  const int64_t* known;       // [heads, rows, levels] or null: codes to take without a search; out of range: none
  DType z_type;
  Metric metric;
  int64_t heads;
  int64_t rows;
  int64_t dim;
  Levels levels;
};

// Bytes of work memory on the current device: O(rows * levels + heads * codes), for cosine also a copy of the
// codebooks, and O(rows * dim) where rows are too long for shared memory.
int64_t residual_quantize_workspace(const ResidualProblem& problem);

// quantized: the type of z, [heads, rows, dim]; indices: int64 [heads, rows, levels], counting from the beginning of
// the level; mse: float or double [heads, levels], 0 where no row has a code; valid_rows: int64 [heads, levels].
void residual_quantize(const ResidualProblem& problem, void* workspace, void* quantized, int64_t* indices, void* mse,
                       int64_t* valid_rows, cudaStream_t stream);

struct ResidualGradientProblem {
  const void* grad_quantized;  // the type of z, [heads, rows, dim], or null: zero
  const void* grad_mse;        // float or double [heads, levels], or null: zero
  const void* z;               // as above
  const void* codebooks;
  const int64_t* indices;     // [heads, rows, levels]; out of range: adds nothing
  const int64_t* valid_rows;  // [heads, levels]
  DType z_type;
  Estimator estimator;
  int64_t heads;
  int64_t rows;
  int64_t dim;
  Levels levels;
};

// Bytes of work memory: 0 unless rows are too long for shared memory.
int64_t residual_quantize_backward_workspace(const ResidualGradientProblem& problem);

// grad_z: the type of z, [heads, rows, dim].
void residual_quantize_backward(const ResidualGradientProblem& problem, void* workspace, void* grad_z,
                                cudaStream_t stream);

struct ResidualStatisticsProblem {
  const void* z;  // as above
  const void* codebooks;
  const int64_t* indices;  // [heads, rows, levels]; out of range: the row belongs to no code of the level
  DType z_type;
  int64_t heads;
  int64_t rows;
  int64_t dim;
  Levels levels;
};

// Bytes of work memory: that of code_statistics for the largest level, and O(rows * dim) where there is a second level.
int64_t residual_statistics_workspace(const ResidualStatisticsProblem& problem);

// counts: int64 [heads, codes of all levels]; sums: float or double [heads, codes of all levels, dim]; of every level
// what code_statistics.h gives for the rows r_q.
void residual_statistics(const ResidualStatisticsProblem& problem, void* workspace, int64_t* counts, void* sums,
                         cudaStream_t stream);

}  // namespace vqkernels::cuda
