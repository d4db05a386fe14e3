// Half a warp takes a row through all levels once more. Where a level's gradient needs no sum over the row, some
// columns at a time go through them in registers; the rotation keeps the row and its gradient in memory of its own.
#include "fixed_order.h"
#include "launch.h"
#include "residual_quantize.h"
#include "residual_rows.h"
#include "rotation.h"

namespace vqkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;  // of a thread at a time

// A row, its levels and the formula's parts. Rows from the last one on repeat it; no thread leaves early, for the sums
// need whole warps.
template <class T>
struct Row {
  const ResidualGradientProblem& p;
  bool exists;
  int64_t index;
  int64_t lane;
  int64_t head;

  __device__ explicit Row(const ResidualGradientProblem& problem) : p(problem) {
    const RowGroup group{kLog2Lanes};
    const int64_t rows = p.heads * p.rows;
    exists = group.row() < rows;
    index = exists ? group.row() : rows - 1;
    lane = group.lane();
    head = index / p.rows;
  }
  __device__ T z(int64_t d) const { return load<T>(p.z, p.z_type, index * p.dim + d); }
  __device__ T grad(int64_t d) const { return load<T>(p.grad_quantized, p.z_type, index * p.dim + d); }
  // Null: the row has no code at the level.
  __device__ const T* code(int64_t level) const {
    const int64_t chosen = p.indices[index * p.levels.count + level], begin = p.levels.begin[level];
    if (chosen < 0 || chosen >= p.levels.begin[level + 1] - begin) return nullptr;
    return static_cast<const T*>(p.codebooks) + (head * p.levels.begin[p.levels.count] + begin + chosen) * p.dim;
  }
  __device__ T coefficient(int64_t level) const {
    const int64_t at = head * p.levels.count + level;
    if (p.grad_mse == nullptr || p.valid_rows[at] <= 0) return 0;
    const double grad_mse = static_cast<const T*>(p.grad_mse)[at];
    return static_cast<T>(grad_mse * 2 / static_cast<double>(p.valid_rows[at] * p.dim));
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) pass_gradient(const ResidualGradientProblem p, void* grad_z) {
  const Row<T> row(p);
  if (!row.exists) return;
  const bool passes = p.grad_quantized != nullptr && p.estimator == Estimator::straight_through;
  for (int64_t begin = row.lane; begin < p.dim; begin += kColumns * kColumnLanes) {
    T residual[kColumns], grad[kColumns], total[kColumns];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int64_t d = begin + n * kColumnLanes;
      residual[n] = d < p.dim ? row.z(d) : T(0);
      grad[n] = passes && d < p.dim ? row.grad(d) : T(0);
      total[n] = 0;
    }
    bool first = true;
    for (int64_t level = 0; level < p.levels.count; ++level) {
      const T* code = row.code(level);
      if (code == nullptr) continue;
      const T coefficient = row.coefficient(level);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int64_t d = begin + n * kColumnLanes;
        residual[n] -= d < p.dim ? code[d] : T(0);
        const T pull = coefficient * residual[n];
        const T term = passes ? grad[n] + pull : pull;
        total[n] = first ? term : total[n] + term;
      }
      first = false;
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int64_t d = begin + n * kColumnLanes;
      if (d < p.dim) store(total[n], p.z_type, row.index * p.dim + d, grad_z);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rotate_gradients(const ResidualGradientProblem p, OwnColumnsPlan own_columns, T* workspace, void* grad_z) {
  const Row<T> row(p);
  const OwnColumns<T> residual = own_columns.array(0, workspace), total = own_columns.array(1, workspace);
  for (int64_t d = row.lane; d < p.dim; d += kColumnLanes) {
    residual(d) = row.z(d);
    total(d) = 0;
  }
  bool first = true;
  for (int64_t level = 0; level < p.levels.count; ++level) {
    const T* code = row.code(level);
    const auto e = [&](int64_t d) { return residual(d); };
    const auto c = [&](int64_t d) { return code == nullptr ? T(0) : code[d]; };
    const auto g = [&](int64_t d) { return row.grad(d); };
    rotate_gradient(e, c, g, p.dim, row.lane, row.coefficient(level), [&](int64_t d, T term) {
      if (code == nullptr) return;
      total(d) = first ? term : total(d) + term;
      residual(d) -= code[d];
    });
    first = first && code == nullptr;
  }
  if (!row.exists) return;
  for (int64_t d = row.lane; d < p.dim; d += kColumnLanes) store(total(d), p.z_type, row.index * p.dim + d, grad_z);
}

bool rotates(const ResidualGradientProblem& p) {
  return p.grad_quantized != nullptr && p.estimator == Estimator::rotation;
}

template <class T>
void backward(const ResidualGradientProblem& p, void* workspace, void* grad_z, cudaStream_t stream) {
  const int64_t rows = p.heads * p.rows;
  if (!rotates(p)) {
    launch(pass_gradient<T>, RowGroup{kLog2Lanes}.blocks(rows, kThreads), kThreads, 0, stream, p, grad_z);
    return;
  }
  const OwnColumnsPlan own_columns(p.dim, 2, sizeof(T));
  launch(rotate_gradients<T>, own_columns.blocks(rows), own_columns.threads, own_columns.shared_bytes, stream, p,
         own_columns, static_cast<T*>(workspace), grad_z);
}

}  // namespace

int64_t residual_quantize_backward_workspace(const ResidualGradientProblem& p) {
  if (!rotates(p)) return 0;
  const int64_t value_bytes = p.z_type == DType::float64 ? 8 : 4;
  return OwnColumnsPlan(p.dim, 2, value_bytes).values(p.heads * p.rows) * value_bytes;
}

void residual_quantize_backward(const ResidualGradientProblem& p, void* workspace, void* grad_z, cudaStream_t stream) {
  if (p.z_type == DType::float64) {
    backward<double>(p, workspace, grad_z, stream);
  } else {
    backward<float>(p, workspace, grad_z, stream);
  }
}

}  // namespace vqkernels::cuda
