// The executable specification of the search (contract: nearest_code.h), and the kernel of machines without
// AVX2. Rows go through in groups of lanes, which changes no result and lets a compiler vectorise the one
// inner loop.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../float16.h"
#include "nearest_code.h"
#include "scalar_norm.h"

namespace vqkernels::cpu {
namespace {

constexpr int64_t kLanes = 16;

template <class T, class Z, class C>
void search(const NearestCodeProblem& p, const SearchBlock& b, T* scores, int64_t* indices) {
  const Z* z = static_cast<const Z*>(p.z) + (b.head * p.rows + b.row_begin) * p.dim;
  const C* codebook = static_cast<const C*>(p.codebook) + b.head * p.codes * p.dim;
  const int64_t rows = b.row_end - b.row_begin;
  std::vector<T> code(static_cast<size_t>(p.dim)), row(code), lanes(static_cast<size_t>(p.dim * kLanes));

  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t count = std::min(kLanes, rows - first);
    T best[kLanes];
    int64_t best_index[kLanes];
    bool row_valid[kLanes] = {};
    for (int64_t l = 0; l < kLanes; ++l) {
      best[l] = -std::numeric_limits<T>::infinity();
      best_index[l] = -1;
      for (int64_t d = 0; d < p.dim; ++d) {
        row[d] = l < count ? widen(z[(first + l) * p.dim + d]) : T(0);
        lanes[d * kLanes + l] = row[d];
      }
      row_valid[l] = is_valid(squared_norm(row.data(), p.dim));
    }
    for (int64_t k = b.code_begin; k < b.code_end; ++k) {
      for (int64_t d = 0; d < p.dim; ++d) code[d] = widen(codebook[k * p.dim + d]);
      const T q = squared_norm(code.data(), p.dim);
      if (!is_valid(q)) continue;
      if (p.metric == Metric::cosine && q > 0) {
        for (int64_t d = 0; d < p.dim; ++d) code[d] /= std::sqrt(q);
      }
      T s[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) s[l] = p.metric == Metric::l2 ? -q / 2 : T(0);
      for (int64_t d = 0; d < p.dim; ++d) {
#pragma GCC unroll 1  // unrolled, GCC no longer sees a loop to vectorise
        for (int64_t l = 0; l < kLanes; ++l) s[l] = std::fma(lanes[d * kLanes + l], code[d], s[l]);
      }
      for (int64_t l = 0; l < kLanes; ++l) {
        if (s[l] > best[l]) {
          best[l] = s[l];
          best_index[l] = k;
        }
      }
    }
    for (int64_t l = 0; l < count; ++l) {
      scores[first + l] = row_valid[l] ? best[l] : -std::numeric_limits<T>::infinity();
      indices[first + l] = row_valid[l] ? best_index[l] : -1;
    }
  }
}

template <class Z>
void search_codebook_type(const NearestCodeProblem& p, const SearchBlock& b, float* scores, int64_t* indices) {
  switch (p.codebook_type) {
    case DType::bfloat16:
      return search<float, Z, BFloat16>(p, b, scores, indices);
    case DType::float16:
      return search<float, Z, Half>(p, b, scores, indices);
    default:
      return search<float, Z, float>(p, b, scores, indices);
  }
}

}  // namespace

void nearest_code_scalar(const NearestCodeProblem& p, const PreparedCodes*, const SearchBlock& b, void* scores,
                         int64_t* indices) {
  switch (p.z_type) {
    case DType::float64:
      return search<double, double, double>(p, b, static_cast<double*>(scores), indices);
    case DType::bfloat16:
      return search_codebook_type<BFloat16>(p, b, static_cast<float*>(scores), indices);
    case DType::float16:
      return search_codebook_type<Half>(p, b, static_cast<float*>(scores), indices);
    default:
      return search_codebook_type<float>(p, b, static_cast<float*>(scores), indices);
  }
}

}  // namespace vqkernels::cpu
