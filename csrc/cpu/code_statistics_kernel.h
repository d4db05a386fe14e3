// Sums of the members of codes, written once; the compiler vectorises along the columns for each instruction set.
#pragma once

#include <algorithm>

#include "../float16.h"
#include "code_statistics.h"

namespace vqkernels::cpu {
namespace {

constexpr int64_t kColumns = 64;  // partial sums that stay in registers
constexpr int64_t kAhead = 12;    // members fetched before their turn: they lie anywhere
constexpr int64_t kLineBytes = 64;

// Columns [0, width) of the members of one code; Width is width where that is known beforehand, else 0. `known`
// counts the members in memory, with those of the codes behind this one.
template <int64_t Width, class T, class Z>
inline void sum_columns(const Z* z, const int64_t* members, int64_t count, int64_t known, int64_t dim, int64_t width,
                        T* sum) {
  constexpr int64_t kWidth = Width > 0 ? Width : kColumns;
  const int64_t columns = Width > 0 ? Width : width;
  double total[kWidth] = {};
  for (int64_t first = 0; first < count; first += kRunLength) {
    const int64_t last = std::min(count, first + kRunLength);
    T run[kWidth] = {};
    for (int64_t m = first; m < last; ++m) {
      const Z* row = z + members[m] * dim;
      if (m + kAhead < known) {
        const char* later = reinterpret_cast<const char*>(z + members[m + kAhead] * dim);
        for (int64_t b = 0; b < columns * int64_t{sizeof(Z)}; b += kLineBytes) __builtin_prefetch(later + b);
      }
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
    const int64_t empty = k;
    while (k < code_end && offsets[k + 1] == offsets[k]) ++k;
    std::fill(sums + empty * dim, sums + k * dim, T(0));
    if (k == code_end) return;
    const int64_t* members = order + offsets[k];
    const int64_t count = offsets[k + 1] - offsets[k], known = offsets[code_end] - offsets[k];
    for (int64_t d = 0; d < dim; d += kColumns) {
      const int64_t width = std::min(kColumns, dim - d);
      T* sum = sums + k * dim + d;
      if (width == kColumns) {
        sum_columns<kColumns>(z + d, members, count, known, dim, width, sum);
      } else if (width == 8) {
        sum_columns<8>(z + d, members, count, known, dim, width, sum);
      } else {
        sum_columns<0>(z + d, members, count, known, dim, width, sum);
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
