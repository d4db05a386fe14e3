// Sums of the members of codes, written once; the compiler vectorises along the columns for each instruction set.
#pragma once

#include <algorithm>

#include "code_statistics.h"
#include "float16.h"

namespace vqkernels::cpu {
namespace {

constexpr int64_t kColumns = 64;  // partial sums that stay in registers

// Columns [0, width) of the members of one code; Width is width where that is known beforehand, else 0.
template <int64_t Width, class T, class Z>
inline void sum_columns(const Z* z, const int64_t* members, int64_t count, int64_t dim, int64_t width, T* sum) {
  const int64_t columns = Width > 0 ? Width : width;
  double total[kColumns] = {};
  for (int64_t first = 0; first < count; first += kRunLength) {
    const int64_t last = std::min(count, first + kRunLength);
    T run[kColumns] = {};
    for (int64_t m = first; m < last; ++m) {
      const Z* row = z + members[m] * dim;
      for (int64_t d = 0; d < columns; ++d) run[d] += widen(row[d]);
    }
    for (int64_t d = 0; d < columns; ++d) total[d] += run[d];
  }
  for (int64_t d = 0; d < columns; ++d) sum[d] = static_cast<T>(total[d]);
}

template <class T, class Z>
inline void sum_codes(const Z* z, const int64_t* order, const int64_t* offsets, int64_t code_begin, int64_t code_end,
                      int64_t dim, T* sums) {
  for (int64_t k = code_begin; k < code_end; ++k) {
    const int64_t* members = order + offsets[k];
    const int64_t count = offsets[k + 1] - offsets[k];
    for (int64_t d = 0; d < dim; d += kColumns) {
      const int64_t width = std::min(kColumns, dim - d);
      T* sum = sums + k * dim + d;
      if (count == 0) {
        std::fill_n(sum, width, T(0));
      } else if (width == kColumns) {
        sum_columns<kColumns>(z + d, members, count, dim, width, sum);
      } else if (width == 8) {
        sum_columns<8>(z + d, members, count, dim, width, sum);
      } else {
        sum_columns<0>(z + d, members, count, dim, width, sum);
      }
    }
  }
}

inline void sum_members(const void* z, DType z_type, const int64_t* order, const int64_t* offsets, int64_t code_begin,
                        int64_t code_end, int64_t dim, void* sums) {
  const auto run = [&](const auto* rows, auto* out) {
    sum_codes(rows, order, offsets, code_begin, code_end, dim, out);
  };
  switch (z_type) {
    case DType::float64:
      return run(static_cast<const double*>(z), static_cast<double*>(sums));
    case DType::bfloat16:
      return run(static_cast<const BFloat16*>(z), static_cast<float*>(sums));
    case DType::float16:
      return run(static_cast<const Half*>(z), static_cast<float*>(sums));
    default:
      return run(static_cast<const float*>(z), static_cast<float*>(sums));
  }
}

}  // namespace
}  // namespace vqkernels::cpu
