// Splits a search into blocks of rows x codes, runs the kernel of the chosen instruction set on them, and
// merges. No result depends on the split: a row's scores do not, and the merge takes the lowest best index.
#include "nearest_code.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "nearest_code_driver.h"

namespace vqkernels::cpu {
namespace {

// Rows that share one pass over a cached piece of the codebook, and the least work worth another thread.
constexpr int64_t kBlockRows = 1024;
constexpr int64_t kMinBlockWork = 1 << 17;  // multiply-adds
constexpr int64_t kMaxBlockCodes = int64_t{1} << 30;

struct Split {
  int64_t block_rows;
  int64_t row_blocks;
  int64_t block_codes;
  int64_t code_blocks;
};

Split choose_split(const NearestCodeProblem& p, int64_t threads) {
  Split s{};
  const int64_t rows_per_thread = ceil_div(ceil_div(p.rows * p.heads, threads), kRowTile) * kRowTile;
  s.block_rows = std::min(kBlockRows, std::max(kRowTile, rows_per_thread));
  s.row_blocks = ceil_div(p.rows, s.block_rows);
  const int64_t blocks = s.row_blocks * p.heads;
  int64_t code_blocks = 1;
  if (blocks < threads) {
    const int64_t block_work = std::min(s.block_rows, p.rows) * p.codes * p.dim;
    code_blocks = std::min(ceil_div(threads, blocks), std::max<int64_t>(1, block_work / kMinBlockWork));
  }
  s.block_codes = std::clamp<int64_t>(ceil_div(p.codes, code_blocks), 1, kMaxBlockCodes);
  s.code_blocks = std::max<int64_t>(1, ceil_div(p.codes, s.block_codes));
  return s;
}

template <class T>
void apply_mask(const NearestCodeProblem& p, const SearchBlock& b, T* scores, int64_t* indices) {
  if (p.mask == nullptr) return;
  const bool* mask = p.mask + b.head * p.rows + b.row_begin;
  for (int64_t i = 0; i < b.row_end - b.row_begin; ++i) {
    if (mask[i]) continue;
    scores[i] = -std::numeric_limits<T>::infinity();
    indices[i] = -1;
  }
}

template <class T>
void search(const NearestCodeProblem& p, T* scores, int64_t* indices, const Parallel& parallel,
            const RowsDone& rows_done) {
  const SearchKernels kernels = choose_search_kernels();
  const Split split = choose_split(p, parallel.threads);
  const int64_t row_blocks = p.heads * split.row_blocks;
  const auto block_of = [&](int64_t row_block, int64_t code_block) {
    SearchBlock b{};
    b.head = row_block / split.row_blocks;
    b.row_begin = row_block % split.row_blocks * split.block_rows;
    b.row_end = std::min(p.rows, b.row_begin + split.block_rows);
    b.code_begin = code_block * split.block_codes;
    b.code_end = std::min(p.codes, b.code_begin + split.block_codes);
    return b;
  };
  const auto finish = [&](const SearchBlock& b) {
    const int64_t at = b.head * p.rows + b.row_begin;
    apply_mask(p, b, scores + at, indices + at);
    if (rows_done) rows_done(b.head, b.row_begin, b.row_end);
  };

  std::optional<Preparation<T>> preparation;
  if (kernels.prepare != nullptr && split.row_blocks > 1) preparation.emplace(p, kernels.prepare, parallel);
  const PreparedCodes* prepared = preparation ? preparation->get() : nullptr;

  if (split.code_blocks == 1) {
    parallel.run(row_blocks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const SearchBlock b = block_of(i, 0);
        const int64_t at = b.head * p.rows + b.row_begin;
        kernels.search(p, prepared, b, scores + at, indices + at);
        finish(b);
      }
    });
    return;
  }

  // Few rows: every block of codes finds its own best, then the best of those wins.
  const int64_t total_rows = p.heads * p.rows;
  std::vector<T> part_scores(static_cast<size_t>(split.code_blocks * total_rows));
  std::vector<int64_t> part_indices(part_scores.size());
  parallel.run(row_blocks * split.code_blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const SearchBlock b = block_of(i / split.code_blocks, i % split.code_blocks);
      const int64_t at = i % split.code_blocks * total_rows + b.head * p.rows + b.row_begin;
      kernels.search(p, prepared, b, part_scores.data() + at, part_indices.data() + at);
    }
  });
  for (int64_t i = 0; i < row_blocks; ++i) {
    const SearchBlock b = block_of(i, 0);
    for (int64_t row = b.head * p.rows + b.row_begin; row < b.head * p.rows + b.row_end; ++row) {
      scores[row] = part_scores[row];
      indices[row] = part_indices[row];
      for (int64_t c = 1; c < split.code_blocks; ++c) {
        if (part_scores[c * total_rows + row] > scores[row]) {
          scores[row] = part_scores[c * total_rows + row];
          indices[row] = part_indices[c * total_rows + row];
        }
      }
    }
    finish(b);
  }
}

}  // namespace

void nearest_code(const NearestCodeProblem& problem, void* scores, int64_t* indices, const Parallel& parallel,
                  const RowsDone& rows_done) {
  if (problem.rows == 0 || problem.heads == 0) return;
  if (problem.z_type == DType::float64) {
    search(problem, static_cast<double*>(scores), indices, parallel, rows_done);
  } else {
    search(problem, static_cast<float*>(scores), indices, parallel, rows_done);
  }
}

}  // namespace vqkernels::cpu
