// Nearest-codebook search on raw pointers: the numerical contract, the driver and the kernels it chooses from.
//
// Scores of a row z and a code c of dimension D, in float (double where the inputs are double):
//     q(x)    = fma(x[D-1], x[D-1], ... fma(x[0], x[0], 0))          ascending d
//     bias(c) = -q(c) / 2 for l2, 0 for dot and cosine
//     s(z, c) = fma(z[D-1], c[D-1], ... fma(z[0], c[0], bias(c)))    ascending d
// For cosine c is first divided by sqrt(q(c)), elementwise; a code with q(c) = 0 stays as it is. The index of
// a row is the code with the largest score, among equal scores the lowest. A row or code whose q is not at
// most MAX / 4 (NaN, Inf, overflow) is invalid: such a code is never chosen, such a row gets index -1.
// Within that bound no score overflows (Cauchy-Schwarz), so -Inf serves as "nothing yet".
#pragma once

#include <cstddef>
#include <cstdint>

#include "../types.h"
#include "parallel.h"

namespace vqkernels::cpu {

// Inputs of `heads` independent searches, rows contiguous. double goes with double only; the other types mix.
struct NearestCodeProblem {
  const void* z;         // [heads, rows, dim]
  const void* codebook;  // [heads, codes, dim]
  const bool* mask;      // [heads, rows] or null; false: index -1
  DType z_type;
  DType codebook_type;
  Metric metric;
  int64_t heads;
  int64_t rows;
  int64_t codes;
  int64_t dim;
};

// A part of one head's search: rows [row_begin, row_end) against codes [code_begin, code_end).
struct SearchBlock {
  int64_t head;
  int64_t row_begin;
  int64_t row_end;
  int64_t code_begin;
  int64_t code_end;
};

// Codes widened and, for cosine, normalised, with their biases (NaN: invalid), in float or double.
struct PreparedCodes {
  const void* codes;  // [heads, codes, dim]
  const void* bias;   // [heads, codes]
};

// Fills bias (and codes, where not null) at [code_begin, code_end) of a head; both count from the start of that head.
using PrepareCodesKernel = void (*)(const NearestCodeProblem&, int64_t head, int64_t code_begin, int64_t code_end,
                                    void* codes, void* bias);

// Writes the best score (float, or double for double inputs) and the index of every row of the block. Rows are
// not masked here. Indices count from the start of the codebook. Without `prepared` the kernel prepares codes itself.
using NearestCodeKernel = void (*)(const NearestCodeProblem&, const PreparedCodes* prepared, const SearchBlock&,
                                   void* scores, int64_t* indices);

void nearest_code_scalar(const NearestCodeProblem&, const PreparedCodes*, const SearchBlock&, void*, int64_t*);
void nearest_code_avx2(const NearestCodeProblem&, const PreparedCodes*, const SearchBlock&, void*, int64_t*);
void nearest_code_avx512(const NearestCodeProblem&, const PreparedCodes*, const SearchBlock&, void*, int64_t*);
void prepare_codes_avx2(const NearestCodeProblem&, int64_t, int64_t, int64_t, void* codes, void* bias);
void prepare_codes_avx512(const NearestCodeProblem&, int64_t, int64_t, int64_t, void* codes, void* bias);

// Called with rows of one head whose indices are final, on the thread that has just found them.
using RowsDone = std::function<void(int64_t head, int64_t row_begin, int64_t row_end)>;

// Searches all heads. scores: float or double [heads, rows], -Inf where the index is -1; indices: int64
// [heads, rows]. Work memory: a block of rows and one of codes a thread, a bias a code, a copy of the codebook where
// it is not float or is normalised, and rows x (code splits) where rows are too few for the threads. Bitwise the same
// for any number of threads.
void nearest_code(const NearestCodeProblem& problem, void* scores, int64_t* indices, const Parallel& parallel,
                  const RowsDone& rows_done = nullptr);

}  // namespace vqkernels::cpu
