// What the drivers of searches share: the kernels of the chosen instruction set, and codes prepared for them.
#pragma once

#include <algorithm>
#include <vector>

#include "capability.h"
#include "nearest_code.h"

namespace vqkernels::cpu {
namespace {

constexpr int64_t kRowTile = 64;  // blocks of rows begin at multiples of it
constexpr int64_t kPrepareCodes = 256;

struct SearchKernels {
  PrepareCodesKernel prepare;  // null: the search needs none
  NearestCodeKernel search;
};

inline SearchKernels choose_search_kernels() {
  switch (capability()) {
#ifdef VQKERNELS_X86
    case Capability::avx512:
      return {prepare_codes_avx512, nearest_code_avx512};
    case Capability::avx2:
      return {prepare_codes_avx2, nearest_code_avx2};
#endif
    default:
      return {nullptr, nearest_code_scalar};
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Codes prepared once, for searches in which several blocks of rows meet them.
template <class T>
class Preparation {
 public:
  Preparation(const NearestCodeProblem& p, PrepareCodesKernel prepare, const Parallel& parallel)
      : bias_(static_cast<size_t>(p.heads * p.codes)) {
    const DType type = sizeof(T) == sizeof(double) ? DType::float64 : DType::float32;
    const bool in_place = p.metric != Metric::cosine && p.codebook_type == type;
    if (!in_place) codes_.resize(bias_.size() * static_cast<size_t>(p.dim));
    const int64_t groups = ceil_div(p.codes, kPrepareCodes);
    parallel.run(p.heads * groups, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / groups, first = i % groups * kPrepareCodes;
        T* head_codes = in_place ? nullptr : codes_.data() + head * p.codes * p.dim;
        prepare(p, head, first, std::min(p.codes, first + kPrepareCodes), head_codes, bias_.data() + head * p.codes);
      }
    });
    prepared_ = {in_place ? p.codebook : static_cast<const void*>(codes_.data()), bias_.data()};
  }
  const PreparedCodes* get() const { return &prepared_; }

 private:
  std::vector<T> codes_, bias_;
  PreparedCodes prepared_;
};

}  // namespace
}  // namespace vqkernels::cpu
