// Search, gather and squared error in one pass over the rows, and the gradient of that with respect to the rows.
//
// The error of a row is the sum of (z - c)^2 in the order of row_dot (fixed_order.h); mse is the sum of all rows'
// errors in the order of column_sum, divided by the elements of the rows that have a code. A row without a code has
// error 0 and gradient 0; it quantizes to zero where the mask excludes it and to NaN otherwise.
//
// Gradients with respect to a row e that chose code c, from the gradient g of its quantized row:
//     straight_through  g
//     rotation          l (g - 2 (g.w) w + 2 (g.q) u), u = e / |e|, q = c / |c|, w = (u + q) / |u + q|,
//                       l = |c| / |e|, norms bounded below by 1e-6 where they divide (arXiv 2410.06424, section 4.2)
//     none              0
// plus, from the commitment loss, coefficient (e - c).
#pragma once

#include <cstdint>

#include "../types.h"
#include "nearest_code.h"
#include "parallel.h"

namespace vqkernels::cpu {

// Rows of one head.
struct QuantizeRows {
  const void* z;           // [rows, dim]
  const void* codebook;    // [codes, dim]
  const int64_t* indices;  // [rows]
  const bool* mask;        // [rows] or null
  DType z_type;
  DType codebook_type;
  int64_t rows;
  int64_t dim;
};

// quantized: the type of z, [rows, dim]; errors: float or double [rows].
using QuantizeRowsKernel = void (*)(const QuantizeRows&, void* quantized, void* errors);
// grad_quantized (null: zero) and grad_z: the type of z, [rows, dim].
using QuantizeRowsBackwardKernel = void (*)(const QuantizeRows&, const void* grad_quantized, Estimator,
                                            double coefficient, void* grad_z);

void quantize_rows_scalar(const QuantizeRows&, void* quantized, void* errors);
void quantize_rows_avx2(const QuantizeRows&, void* quantized, void* errors);
void quantize_rows_avx512(const QuantizeRows&, void* quantized, void* errors);
void quantize_rows_backward_scalar(const QuantizeRows&, const void*, Estimator, double, void* grad_z);
void quantize_rows_backward_avx2(const QuantizeRows&, const void*, Estimator, double, void* grad_z);
void quantize_rows_backward_avx512(const QuantizeRows&, const void*, Estimator, double, void* grad_z);

struct QuantizeResult {
  double mse;          // 0 where no row has a code
  int64_t valid_rows;  // rows of all heads that have a code
};

// quantized [heads, rows, dim], indices [heads, rows].
QuantizeResult vector_quantize(const NearestCodeProblem& problem, void* quantized, int64_t* indices,
                               const Parallel& parallel);

// coefficient: of (e - c) in the gradient. grad_z [heads, rows, dim].
void vector_quantize_backward(const NearestCodeProblem& problem, const int64_t* indices, const void* grad_quantized,
                              Estimator estimator, double coefficient, void* grad_z, const Parallel& parallel);

}  // namespace vqkernels::cpu
