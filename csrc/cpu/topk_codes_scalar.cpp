// The executable specification of topk_codes.h, and the kernel of machines without AVX2.
#include <cmath>
#include <vector>

#include "scalar_norm.h"
#include "topk_codes.h"
#include "topk_heap.h"
#include "with_types.h"

namespace vqkernels::cpu {
namespace {

template <class T, class Z, class C>
void topk(const NearestCodeProblem& p, const SearchBlock& b, int64_t k, T* scores, int64_t* indices) {
  const Z* z = static_cast<const Z*>(p.z) + (b.head * p.rows + b.row_begin) * p.dim;
  const C* codebook = static_cast<const C*>(p.codebook) + b.head * p.codes * p.dim;
  const int64_t rows = b.row_end - b.row_begin;
  std::vector<T> wide(static_cast<size_t>(rows * p.dim)), code(static_cast<size_t>(p.dim));
  for (int64_t i = 0; i < rows * p.dim; ++i) wide[i] = widen(z[i]);
  std::vector<char> row_valid(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) {
    row_valid[i] = is_valid(squared_norm(wide.data() + i * p.dim, p.dim));
    TopkHeap<T>(scores + i * k, indices + i * k, k).clear();
  }
  for (int64_t j = b.code_begin; j < b.code_end; ++j) {
    for (int64_t d = 0; d < p.dim; ++d) code[d] = widen(codebook[j * p.dim + d]);
    const T q = squared_norm(code.data(), p.dim);
    if (!is_valid(q)) continue;
    if (p.metric == Metric::cosine && q > 0) {
      for (int64_t d = 0; d < p.dim; ++d) code[d] /= std::sqrt(q);
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (!row_valid[i]) continue;
      T score = p.metric == Metric::l2 ? -q / 2 : T(0);
      for (int64_t d = 0; d < p.dim; ++d) score = std::fma(wide[i * p.dim + d], code[d], score);
      const TopkHeap<T> heap(scores + i * k, indices + i * k, k);
      if (score > heap.worst()) heap.replace(score, j);
    }
  }
  for (int64_t i = 0; i < rows; ++i) TopkHeap<T>(scores + i * k, indices + i * k, k).sort();
}

}  // namespace

void topk_codes_scalar(const NearestCodeProblem& p, const PreparedCodes*, const SearchBlock& b, int64_t k, void* scores,
                       int64_t* indices) {
  with_types(p.z_type, p.codebook_type, [&](auto t, auto z, auto c) {
    using T = decltype(t);
    topk<T, decltype(z), decltype(c)>(p, b, k, static_cast<T*>(scores), indices);
  });
}

}  // namespace vqkernels::cpu
