// Shares out blocks of rows, each of which meets all codes. No result depends on the split.
#include "topk_codes.h"

#include <limits>
#include <optional>

#include "nearest_code_driver.h"

namespace vqkernels::cpu {
namespace {

constexpr int64_t kBlockRows = 256;
constexpr int64_t kLeastRows = 16;  // a block of fewer would leave lanes empty

TopkCodesKernel choose_kernel() {
  switch (capability()) {
#ifdef VQKERNELS_X86
    case Capability::avx512:
      return topk_codes_avx512;
    case Capability::avx2:
      return topk_codes_avx2;
#endif
    default:
      return topk_codes_scalar;
  }
}

template <class T>
void topk(const NearestCodeProblem& p, int64_t k, T* scores, int64_t* indices, const Parallel& parallel) {
  const TopkCodesKernel kernel = choose_kernel();
  const PrepareCodesKernel prepare = choose_search_kernels().prepare;
  const int64_t rows_per_thread = ceil_div(p.rows * p.heads, parallel.threads);
  const int64_t block_rows = std::min(kBlockRows, ceil_div(rows_per_thread, kLeastRows) * kLeastRows);
  const int64_t blocks_per_head = ceil_div(p.rows, block_rows);
  std::optional<Preparation<T>> preparation;
  if (prepare != nullptr && blocks_per_head > 1) preparation.emplace(p, prepare, parallel);
  const PreparedCodes* prepared = preparation ? preparation->get() : nullptr;
  parallel.run(p.heads * blocks_per_head, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks_per_head, first = i % blocks_per_head * block_rows;
      const SearchBlock b{head, first, std::min(p.rows, first + block_rows), 0, p.codes};
      const int64_t at = head * p.rows + first;
      kernel(p, prepared, b, k, scores + at * k, indices + at * k);
      if (p.mask == nullptr) continue;
      for (int64_t row = at; row < head * p.rows + b.row_end; ++row) {
        if (p.mask[row]) continue;
        std::fill_n(scores + row * k, k, -std::numeric_limits<T>::infinity());
        std::fill_n(indices + row * k, k, int64_t{-1});
      }
    }
  });
}

}  // namespace

void topk_codes(const NearestCodeProblem& p, int64_t k, void* scores, int64_t* indices, const Parallel& parallel) {
  if (p.rows == 0 || p.heads == 0) return;
  if (p.z_type == DType::float64) {
    topk(p, k, static_cast<double*>(scores), indices, parallel);
  } else {
    topk(p, k, static_cast<float*>(scores), indices, parallel);
  }
}

}  // namespace vqkernels::cpu
