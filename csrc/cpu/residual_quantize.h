// All levels of residual quantization in one pass over the rows, the gradient of that, and statistics of every level.
//
// r_0 = z; level q finds the code c of r_q as nearest_code.h defines it, and leaves r_{q+1} = r_q - c, in float
// (double where the inputs are double). A row quantizes to ((c_0 + c_1) + c_2) + ..., rounded once to the type of z.
// Errors and mse of a level are those of vector_quantize.h for the rows r_q, mse one a head. A row has index -1 at a
// level that does not run for it, at one that finds no code, and at all levels after that. It quantizes to NaN where a
// level that should run finds no code, and to zero where no level should run.
//
// The gradient with respect to a row is the sum over the levels where it has a code, in ascending order, of what
// vector_quantize.h says of r_q, rounded once.
#pragma once

#include <cstdint>

#include "../types.h"
#include "nearest_code.h"
#include "parallel.h"

namespace vqkernels::cpu {

// double goes with double only; the other types mix.
struct ResidualProblem {
  const void* z;              // [heads, rows, dim]
  const void* codebooks;      // [heads, codes of all levels, dim], a level behind the other
  const int64_t* sizes;       // [levels], codes a level
  const bool* mask;           // [heads, rows] or null; false: no level runs
  const int64_t* num_levels;  // [heads, rows] or null; level q of a row runs where q is less
  const int64_t* chosen;      // [heads, rows, levels] or null: codes to take instead of a search
  DType z_type;
  DType codebook_type;
  Metric metric;
  int64_t heads;
  int64_t rows;
  int64_t levels;
  int64_t codes;  // of all levels
  int64_t dim;
};

// One level of some rows, whose residuals are float (double for double codes).
struct ResidualStep {
  void* residual;          // [rows, dim]: loses the codes
  const void* codes;       // [codes of the level, dim]
  const int64_t* indices;  // [rows]; -1: the row stays as it is
  void* sum;               // [rows, dim] or null: gets the codes
  void* errors;            // [rows] or null: squared norms of the new residuals, 0 where the index is -1
  DType codebook_type;
  int64_t rows;
  int64_t dim;
  bool is_first;  // sum is set, not added to
};
using ResidualStepKernel = void (*)(const ResidualStep&);

// Rows of one head.
struct ResidualRows {
  const void* z;           // [rows, dim]
  const void* codebooks;   // [codes of all levels, dim]
  const int64_t* indices;  // [rows, levels]
  const int64_t* sizes;    // [levels]
  DType z_type;
  DType codebook_type;
  int64_t rows;
  int64_t levels;
  int64_t dim;
};
// grad_quantized (null: zero) and grad_z: the type of z, [rows, dim]; coefficients: of (r - c), one a level.
using ResidualBackwardKernel = void (*)(const ResidualRows&, const void* grad_quantized, Estimator,
                                        const double* coefficients, void* grad_z);

void residual_step_scalar(const ResidualStep&);
void residual_step_avx2(const ResidualStep&);
void residual_step_avx512(const ResidualStep&);
void residual_backward_scalar(const ResidualRows&, const void*, Estimator, const double*, void* grad_z);
void residual_backward_avx2(const ResidualRows&, const void*, Estimator, const double*, void* grad_z);
void residual_backward_avx512(const ResidualRows&, const void*, Estimator, const double*, void* grad_z);

// quantized [heads, rows, dim] in the type of z; indices [heads, rows, levels], counted within a level; mse and
// valid_rows [heads, levels]. Work memory: an error a row and level, a bias a code, a copy of the codebooks where they
// are not float or are normalised, and blocks of rows, one a thread. Bitwise the same for any number of threads.
void residual_quantize(const ResidualProblem& problem, void* quantized, int64_t* indices, double* mse,
                       int64_t* valid_rows, const Parallel& parallel);

// indices: those of residual_quantize; coefficients [heads, levels]. grad_z [heads, rows, dim].
void residual_quantize_backward(const ResidualProblem& problem, const int64_t* indices, const void* grad_quantized,
                                Estimator estimator, const double* coefficients, void* grad_z,
                                const Parallel& parallel);

// counts int64 [heads, codes]; sums float (double for double rows) [heads, codes, dim]: of every level what
// code_statistics gives for the rows r_q. Throws std::out_of_range as that does.
void residual_statistics(const ResidualProblem& problem, const int64_t* indices, int64_t* counts, void* sums,
                         const Parallel& parallel);

}  // namespace vqkernels::cpu
