// Sorts the rows by code with a stable counting sort, then lets each thread sum whole codes.
#include "code_statistics.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "capability.h"

namespace vqkernels::cpu {
namespace {

SumMembersKernel choose_kernel() {
  switch (capability()) {
#ifdef VQKERNELS_X86
    case Capability::avx512:
      return sum_members_avx512;
    case Capability::avx2:
      return sum_members_avx2;
#endif
    default:
      return sum_members_scalar;
  }
}

void count_members(const CodeStatisticsProblem& p, const int64_t* indices, int64_t* counts) {
  std::fill_n(counts, p.codes, 0);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t code = indices[row];
    if (code < -1 || code >= p.codes) {
      throw std::out_of_range("indices: expected values from -1 to " + std::to_string(p.codes - 1) + ", got " +
                              std::to_string(code));
    }
    if (code >= 0) ++counts[code];
  }
}

}  // namespace

void code_statistics(const CodeStatisticsProblem& p, int64_t* counts, void* sums, const Parallel& parallel) {
  const SumMembersKernel kernel = choose_kernel();
  const int64_t z_bytes = p.z_type == DType::float64 ? 8 : p.z_type == DType::float32 ? 4 : 2;
  const int64_t sum_bytes = p.z_type == DType::float64 ? 8 : 4;
  std::vector<int64_t> order(static_cast<size_t>(p.rows)), next(static_cast<size_t>(p.codes)),
      offsets(static_cast<size_t>(p.codes + 1));
  for (int64_t head = 0; head < p.heads; ++head) {
    const int64_t* indices = p.indices + head * p.rows;
    int64_t* head_counts = counts + head * p.codes;
    count_members(p, indices, head_counts);
    offsets[0] = 0;
    for (int64_t k = 0; k < p.codes; ++k) {
      next[k] = offsets[k];
      offsets[k + 1] = offsets[k] + head_counts[k];
    }
    for (int64_t row = 0; row < p.rows; ++row) {
      if (indices[row] >= 0) order[next[indices[row]]++] = row;
    }
    const char* z = static_cast<const char*>(p.z) + head * p.rows * p.dim * z_bytes;
    char* head_sums = static_cast<char*>(sums) + head * p.codes * p.dim * sum_bytes;
    // Threads share out members and codes alike: code k begins at work unit offsets[k] + k.
    const auto code_at = [&](int64_t unit) {
      int64_t low = 0, high = p.codes;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (offsets[middle] + middle < unit) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      return low;
    };
    parallel.run(offsets[p.codes] + p.codes, [&](int64_t begin, int64_t end) {
      kernel(z, p.z_type, order.data(), offsets.data(), code_at(begin), code_at(end), p.dim, head_sums);
    });
  }
}

}  // namespace vqkernels::cpu
