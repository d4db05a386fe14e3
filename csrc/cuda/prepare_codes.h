// What a search knows of rows and codes beforehand: which are valid, biases, and for cosine codes divided by their
// norms.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "../types.h"
#include "fixed_order.h"
#include "launch.h"

namespace vqkernels::cuda {
namespace {

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
template <class T>
constexpr T kMaxNorm = std::numeric_limits<T>::max() / 4;

constexpr int kNormThreads = 128;
constexpr int kNormColumns = 32;

template <class T>
constexpr int64_t kNormSharedBytes = kNormThreads * (kNormColumns + 2) * static_cast<int64_t>(sizeof(T));

// q of line threadIdx.x of x [lines, dim] (0 from lines on), through shared memory so that global loads coalesce.
template <class T>
__device__ inline T squared_norm(const T* x, int64_t lines, int64_t dim) {
  T* shared = reinterpret_cast<T*>(vqkernels_shared);
  T q = 0;
  for (int64_t first = 0; first < dim; first += kNormColumns) {
    const int64_t left = dim - first;
    __syncthreads();
    for (int i = threadIdx.x; i < kNormThreads * kNormColumns; i += kNormThreads) {
      const int line = i / kNormColumns, d = i % kNormColumns;
      shared[line * (kNormColumns + 1) + d] = line < lines && d < left ? x[line * dim + first + d] : T(0);
    }
    __syncthreads();
    const T* own = shared + threadIdx.x * (kNormColumns + 1);
    for (int d = 0; d < kNormColumns && d < left; ++d) q = fused(own[d], own[d], q);
  }
  return q;
}

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    check_rows(const T* z, const bool* mask, int64_t rows, int64_t dim, bool* row_valid) {
  const int64_t first = int64_t{blockIdx.x} * kNormThreads, row = first + threadIdx.x;
  const T q = squared_norm(z + first * dim, rows - first, dim);
  if (row < rows) row_valid[row] = q <= kMaxNorm<T> && (mask == nullptr || mask[row]);
}

// The biases of kNormThreads codes, NaN from `lines` on, and, where normalised is not null, the codes divided by their
// norms. By a block of kNormThreads threads.
template <class T>
__device__ inline void prepare_lines(const T* codes, Metric metric, int64_t lines, int64_t dim, T* bias,
                                     T* normalised) {
  const T q = squared_norm(codes, lines, dim);
  const bool valid = static_cast<int64_t>(threadIdx.x) < lines && q <= kMaxNorm<T>;
  const T value = metric == Metric::l2 ? -q / 2 : T(0);
  bias[threadIdx.x] = valid ? value : kNaN<T>;
  if (normalised == nullptr) return;
  T* divisors = reinterpret_cast<T*>(vqkernels_shared) + kNormThreads * (kNormColumns + 1);
  divisors[threadIdx.x] = valid && q > 0 ? root(q) : T(1);
  __syncthreads();
  for (int line = threadIdx.x / kWarpSize; line < kNormThreads && line < lines; line += kNormThreads / kWarpSize) {
    for (int64_t d = threadIdx.x % kWarpSize; d < dim; d += kWarpSize) {
      normalised[line * dim + d] = codes[line * dim + d] / divisors[line];
    }
  }
}

// bias: [heads, bias_pitch], a multiple of kNormThreads; normalised: [heads, codes, dim] or null.
template <class T>
__global__ void __launch_bounds__(kNormThreads) prepare_codes(const T* codebook, Metric metric, int64_t codes,
                                                              int64_t dim, int64_t bias_pitch, T* bias, T* normalised) {
  const int64_t blocks = bias_pitch / kNormThreads;
  const int64_t head = blockIdx.x / blocks, first = blockIdx.x % blocks * kNormThreads;
  const int64_t offset = (head * codes + first) * dim;
  prepare_lines(codebook + offset, metric, codes - first, dim, bias + head * bias_pitch + first,
                normalised == nullptr ? nullptr : normalised + offset);
}

}  // namespace
}  // namespace vqkernels::cuda
