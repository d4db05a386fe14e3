// code_statistics, level by level, of residual rows that are updated in place.
#include <algorithm>

#include "code_statistics.h"
#include "fixed_order.h"
#include "launch.h"
#include "residual_quantize.h"
#include "residual_rows.h"

namespace vqkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLog2ColumnThreads = 8;

// Brings the rows to `level`: their indices there, [heads, rows], and, from the second level on, what the level before
// leaves of them. A group of threads a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    enter_level(const ResidualStatisticsProblem p, int64_t level, RowGroup group, T* residual, int64_t* level_indices) {
  const int64_t row = group.row();
  if (row >= p.heads * p.rows) return;
  const int64_t* indices = p.indices + row * p.levels.count;
  if (group.lane() == 0) level_indices[row] = indices[level];
  if (level == 0) return;
  const int64_t chosen = indices[level - 1], begin = p.levels.begin[level - 1];
  const bool has_code = chosen >= 0 && chosen < p.levels.begin[level] - begin;
  const int64_t code = row / p.rows * p.levels.begin[p.levels.count] + begin + (has_code ? chosen : 0);
  const T* c = static_cast<const T*>(p.codebooks) + code * p.dim;
  for (int64_t d = group.lane(); d < p.dim; d += group.size()) {
    const int64_t at = row * p.dim + d;
    const T value = level == 1 ? load<T>(p.z, p.z_type, at) : residual[at];
    residual[at] = has_code ? value - c[d] : value;
  }
}

CodeStatisticsProblem level_problem(const ResidualStatisticsProblem& p, int64_t level, const void* residual,
                                    const int64_t* level_indices) {
  const DType wide = p.z_type == DType::float64 ? DType::float64 : DType::float32;
  const int64_t codes = p.levels.begin[level + 1] - p.levels.begin[level];
  return {level == 0 ? p.z : residual,   level_indices, level == 0 ? p.z_type : wide, p.heads, p.rows, codes, p.dim,
          p.levels.begin[p.levels.count]};
}

template <class T>
struct Plan {
  T* residual = nullptr;
  int64_t* level_indices;
  void* statistics;
  int64_t bytes;

  Plan(const ResidualStatisticsProblem& p, void* workspace) {
    Workspace memory(workspace);
    if (p.levels.count > 1) residual = memory.take<T>(p.heads * p.rows * p.dim);
    level_indices = memory.take<int64_t>(p.heads * p.rows);
    int64_t most = 0;
    for (int64_t level = 0; level < p.levels.count; ++level) {
      most = std::max(most, code_statistics_workspace(level_problem(p, level, nullptr, nullptr)));
    }
    statistics = memory.take<char>(most);
    bytes = memory.bytes();
  }
};

template <class T>
void collect(const ResidualStatisticsProblem& p, void* workspace, int64_t* counts, T* sums, cudaStream_t stream) {
  const Plan<T> plan(p, workspace);
  for (int64_t level = 0; level < p.levels.count; ++level) {
    const RowGroup group = level == 0 ? RowGroup{0} : RowGroup::of(p.dim, kLog2ColumnThreads);
    launch(enter_level<T>, group.blocks(p.heads * p.rows, kThreads), kThreads, 0, stream, p, level, group,
           plan.residual, plan.level_indices);
    code_statistics(level_problem(p, level, plan.residual, plan.level_indices), plan.statistics,
                    counts + p.levels.begin[level], sums + p.levels.begin[level] * p.dim, stream);
  }
}

}  // namespace

int64_t residual_statistics_workspace(const ResidualStatisticsProblem& p) {
  return p.z_type == DType::float64 ? Plan<double>(p, nullptr).bytes : Plan<float>(p, nullptr).bytes;
}

void residual_statistics(const ResidualStatisticsProblem& p, void* workspace, int64_t* counts, void* sums,
                         cudaStream_t stream) {
  if (p.z_type == DType::float64) {
    collect(p, workspace, counts, static_cast<double*>(sums), stream);
  } else {
    collect(p, workspace, counts, static_cast<float*>(sums), stream);
  }
}

}  // namespace vqkernels::cuda
