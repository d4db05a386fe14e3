// A block of rows goes through all levels while its residuals stay in the L2 cache. Too few rows for the threads: one
// block, whose searches share out the codes. No result depends on the split.
#include "residual_quantize.h"

#include <limits>
#include <optional>

#include "buffer.h"
#include "code_statistics.h"
#include "fixed_order.h"
#include "nearest_code_driver.h"
#include "with_types.h"

namespace vqkernels::cpu {
namespace {

constexpr int64_t kBlockRows = 1024;
constexpr int64_t kBlockBytes = 512 * 1024;

struct Kernels {
  ResidualStepKernel step;
  ResidualBackwardKernel backward;
};

Kernels choose_kernels() {
  switch (capability()) {
#ifdef VQKERNELS_X86
    case Capability::avx512:
      return {residual_step_avx512, residual_backward_avx512};
    case Capability::avx2:
      return {residual_step_avx2, residual_backward_avx2};
#endif
    default:
      return {residual_step_scalar, residual_backward_scalar};
  }
}

int64_t bytes(DType type) { return type == DType::float64 ? 8 : type == DType::float32 ? 4 : 2; }

const void* advance(const void* p, int64_t elements, DType type) {
  return static_cast<const char*>(p) + elements * bytes(type);
}

void* advance(void* p, int64_t elements, DType type) { return static_cast<char*>(p) + elements * bytes(type); }

template <class T>
constexpr DType kType = sizeof(T) == sizeof(double) ? DType::float64 : DType::float32;

template <class T>
void widen_rows(const void* x, DType type, int64_t count, T* out) {
  with_types(type, type, [&](auto, auto x_type, auto) {
    const auto* values = static_cast<const decltype(x_type)*>(x);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(widen(values[i]));
  });
}

template <class T>
void narrow_rows(const T* x, DType type, int64_t count, void* out) {
  with_types(type, type, [&](auto t, auto x_type, auto) {
    auto* values = static_cast<decltype(x_type)*>(out);
    for (int64_t i = 0; i < count; ++i) narrow(static_cast<decltype(t)>(x[i]), values + i);
  });
}

int64_t level_begin(const ResidualProblem& p, int64_t level) {
  int64_t begin = 0;
  for (int64_t q = 0; q < level; ++q) begin += p.sizes[q];
  return begin;
}

// Searches `rows` residuals at one level of a head; indices count from the beginning of the level.
template <class T>
using LevelSearch =
    std::function<void(int64_t head, int64_t level, const T* residual, int64_t rows, T* scores, int64_t* indices)>;

template <class T>
NearestCodeProblem level_problem(const ResidualProblem& p, int64_t head, int64_t level, const T* residual,
                                 int64_t rows) {
  const int64_t first = head * p.codes + level_begin(p, level);
  return {residual,
          advance(p.codebooks, first * p.dim, p.codebook_type),
          nullptr,
          kType<T>,
          p.codebook_type,
          p.metric,
          1,
          rows,
          p.sizes[level],
          p.dim};
}

// Work memory of a block of rows.
template <class T>
struct Block {
  Block(int64_t rows, int64_t dim, bool needs_sum)
      : residual(rows * dim), sum(needs_sum ? rows * dim : 0), errors(rows), found(rows), runs(rows) {}
  const Buffer<T> residual, sum, errors;
  const Buffer<int64_t> found;
  const Buffer<bool> runs;
};

// Takes rows [begin, end) of a head through all levels. errors [heads, levels, rows].
template <class T>
void quantize_block(const ResidualProblem& p, int64_t head, int64_t begin, int64_t end, const Block<T>& block,
                    const LevelSearch<T>& search, void* quantized, int64_t* indices, T* errors) {
  const ResidualStepKernel step = choose_kernels().step;
  const int64_t first = head * p.rows + begin, rows = end - begin;
  T* const residual = block.residual.get();
  void* const out = advance(quantized, first * p.dim, p.z_type);
  T* const sum = p.z_type == kType<T> ? static_cast<T*>(out) : block.sum.get();
  bool* const runs = block.runs.get();
  int64_t* const found = block.found.get();
  widen_rows(advance(p.z, first * p.dim, p.z_type), p.z_type, rows * p.dim, residual);
  for (int64_t i = 0; i < rows; ++i) {
    runs[i] = (p.mask == nullptr || p.mask[first + i]) && (p.num_levels == nullptr || p.num_levels[first + i] > 0);
    if (!runs[i]) std::fill_n(sum + i * p.dim, p.dim, T(0));
  }
  int64_t run_begin = 0, run_end = rows;  // the rows that still run lie here
  for (int64_t q = 0; q < p.levels; ++q) {
    if (p.num_levels != nullptr) {
      for (int64_t i = run_begin; i < run_end; ++i) runs[i] = runs[i] && q < p.num_levels[first + i];
    }
    while (run_begin < run_end && !runs[run_begin]) ++run_begin;
    while (run_begin < run_end && !runs[run_end - 1]) --run_end;
    std::fill_n(found, rows, -1);
    if (p.chosen != nullptr) {
      for (int64_t i = run_begin; i < run_end; ++i) found[i] = p.chosen[(first + i) * p.levels + q];
    } else if (run_begin < run_end) {
      search(head, q, residual + run_begin * p.dim, run_end - run_begin, block.errors.get(), found + run_begin);
    }
    for (int64_t i = run_begin; i < run_end; ++i) {
      if (!runs[i]) {
        found[i] = -1;
      } else if (found[i] < 0) {
        found[i] = -1;
        runs[i] = false;
        std::fill_n(sum + i * p.dim, p.dim, std::numeric_limits<T>::quiet_NaN());
      }
    }
    for (int64_t i = 0; i < rows; ++i) indices[(first + i) * p.levels + q] = found[i];
    const int64_t codes = (head * p.codes + level_begin(p, q)) * p.dim;
    step({residual, advance(p.codebooks, codes, p.codebook_type), found, sum,
          errors + (head * p.levels + q) * p.rows + begin, p.codebook_type, rows, p.dim, q == 0});
  }
  if (sum != out) narrow_rows(sum, p.z_type, rows * p.dim, out);
}

template <class T>
void quantize(const ResidualProblem& p, void* quantized, int64_t* indices, double* mse, int64_t* valid_rows,
              const Parallel& parallel) {
  const SearchKernels kernels = choose_search_kernels();
  const bool needs_sum = p.z_type != kType<T>;
  const int64_t rows_per_thread = ceil_div(p.rows * p.heads, parallel.threads);
  const int64_t most_rows = std::min(kBlockRows, kBlockBytes / (p.dim * int64_t{sizeof(T)}));
  const int64_t block_rows =
      std::max(kRowTile, std::min(most_rows, ceil_div(rows_per_thread, kRowTile) * kRowTile) / kRowTile * kRowTile);
  const int64_t blocks_per_head = ceil_div(p.rows, block_rows), blocks = p.heads * blocks_per_head;
  const Buffer<T> errors(p.heads * p.levels * p.rows);

  if (blocks < parallel.threads) {
    const Block<T> block(p.rows, p.dim, needs_sum);
    for (int64_t head = 0; head < p.heads; ++head) {
      quantize_block<T>(
          p, head, 0, p.rows, block,
          [&](int64_t, int64_t level, const T* residual, int64_t rows, T* scores, int64_t* found) {
            nearest_code(level_problem(p, head, level, residual, rows), scores, found, parallel);
          },
          quantized, indices, errors.get());
    }
  } else {
    std::optional<Preparation<T>> preparation;
    if (kernels.prepare != nullptr && blocks_per_head > 1 && p.chosen == nullptr) {
      const NearestCodeProblem all{nullptr,  p.codebooks, nullptr, kType<T>, p.codebook_type,
                                   p.metric, p.heads,     0,       p.codes,  p.dim};
      preparation.emplace(all, kernels.prepare, parallel);
    }
    const auto search = [&](int64_t head, int64_t level, const T* residual, int64_t rows, T* scores, int64_t* found) {
      const NearestCodeProblem problem = level_problem(p, head, level, residual, rows);
      PreparedCodes prepared{};
      if (preparation) {
        const int64_t first = head * p.codes + level_begin(p, level);
        prepared = {static_cast<const T*>(preparation->get()->codes) + first * p.dim,
                    static_cast<const T*>(preparation->get()->bias) + first};
      }
      kernels.search(problem, preparation ? &prepared : nullptr, {0, 0, rows, 0, problem.codes}, scores, found);
    };
    parallel.run(blocks, [&](int64_t begin, int64_t end) {
      const Block<T> block(std::min(block_rows, p.rows), p.dim, needs_sum);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % blocks_per_head * block_rows;
        quantize_block<T>(p, i / blocks_per_head, first, std::min(p.rows, first + block_rows), block, search, quantized,
                          indices, errors.get());
      }
    });
  }

  for (int64_t head = 0; head < p.heads; ++head) {
    for (int64_t q = 0; q < p.levels; ++q) {
      const int64_t level = head * p.levels + q;
      int64_t valid = 0;
      for (int64_t row = 0; row < p.rows; ++row) valid += indices[(head * p.rows + row) * p.levels + q] >= 0;
      valid_rows[level] = valid;
      mse[level] =
          valid > 0 ? column_sum(errors.get() + level * p.rows, p.rows) / static_cast<double>(valid * p.dim) : 0;
    }
  }
}

template <class T>
void statistics(const ResidualProblem& p, const int64_t* indices, int64_t* counts, T* sums, const Parallel& parallel) {
  const ResidualStepKernel step = choose_kernels().step;
  const Buffer<T> residual(p.rows * p.dim);
  const Buffer<int64_t> found(p.rows);
  for (int64_t head = 0; head < p.heads; ++head) {
    widen_rows(advance(p.z, head * p.rows * p.dim, p.z_type), p.z_type, p.rows * p.dim, residual.get());
    int64_t first = head * p.codes;
    for (int64_t q = 0; q < p.levels; ++q) {
      for (int64_t row = 0; row < p.rows; ++row) found[row] = indices[(head * p.rows + row) * p.levels + q];
      code_statistics({residual.get(), found.get(), kType<T>, 1, p.rows, p.sizes[q], p.dim}, counts + first,
                      sums + first * p.dim, parallel);
      if (q + 1 < p.levels) {
        const void* codes = advance(p.codebooks, first * p.dim, p.codebook_type);
        parallel.run(p.rows, [&](int64_t begin, int64_t end) {
          step({residual.get() + begin * p.dim, codes, found.get() + begin, nullptr, nullptr, p.codebook_type,
                end - begin, p.dim, false});
        });
      }
      first += p.sizes[q];
    }
  }
}

}  // namespace

void residual_quantize(const ResidualProblem& p, void* quantized, int64_t* indices, double* mse, int64_t* valid_rows,
                       const Parallel& parallel) {
  return p.z_type == DType::float64 ? quantize<double>(p, quantized, indices, mse, valid_rows, parallel)
                                    : quantize<float>(p, quantized, indices, mse, valid_rows, parallel);
}

void residual_quantize_backward(const ResidualProblem& p, const int64_t* indices, const void* grad_quantized,
                                Estimator estimator, const double* coefficients, void* grad_z,
                                const Parallel& parallel) {
  const ResidualBackwardKernel kernel = choose_kernels().backward;
  for (int64_t head = 0; head < p.heads; ++head) {
    const void* codebooks = advance(p.codebooks, head * p.codes * p.dim, p.codebook_type);
    parallel.run(p.rows, [&](int64_t begin, int64_t end) {
      const int64_t first = head * p.rows + begin, element = first * p.dim;
      const ResidualRows rows{advance(p.z, element, p.z_type),
                              codebooks,
                              indices + first * p.levels,
                              p.sizes,
                              p.z_type,
                              p.codebook_type,
                              end - begin,
                              p.levels,
                              p.dim};
      const void* grad = grad_quantized == nullptr ? nullptr : advance(grad_quantized, element, p.z_type);
      kernel(rows, grad, estimator, coefficients + head * p.levels, advance(grad_z, element, p.z_type));
    });
  }
}

void residual_statistics(const ResidualProblem& p, const int64_t* indices, int64_t* counts, void* sums,
                         const Parallel& parallel) {
  return p.z_type == DType::float64 ? statistics(p, indices, counts, static_cast<double*>(sums), parallel)
                                    : statistics(p, indices, counts, static_cast<float*>(sums), parallel);
}

}  // namespace vqkernels::cpu
