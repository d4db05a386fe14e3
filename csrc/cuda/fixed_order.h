// The sums of cpu/fixed_order.h on the device: the same additions in the same order, shared out among threads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../types.h"
#include "launch.h"

namespace vqkernels::cuda {

__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

__device__ inline float root(float x) { return __fsqrt_rn(x); }
__device__ inline double root(double x) { return __dsqrt_rn(x); }

// The pairwise sum of what the kColumnLanes threads that share a row bring. All get it: an addition is commutative, so
// that both ends of an exchange compute the same bits. Every thread of the warp calls it.
template <class T>
__device__ inline T sum_of_lanes(T sum) {
  for (int half = kColumnLanes / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kFullWarp, sum, half);
  return sum;
}

// row_dot, by the kColumnLanes threads that share a row; lane is a thread's place among them. All get the sum. Every
// thread of the warp calls it.
template <class T, class A, class B>
__device__ inline T row_dot(int64_t dim, int64_t lane, const A& a, const B& b) {
  T sum = 0;
  for (int64_t d = lane; d < dim; d += kColumnLanes) sum = fused(a(d), b(d), sum);
  return sum_of_lanes(sum);
}

// column_sum of x(0), ..., x(n - 1), by a block of kRowLanes threads with kRowLanes doubles of shared memory. Thread 0
// gets the sum.
template <class X>
__device__ inline double column_sum(int64_t n, double* lanes, const X& x) {
  double sum = 0;
#pragma unroll 16
  for (int64_t i = threadIdx.x; i < n; i += kRowLanes) sum += x(i);
  const int lane = static_cast<int>(threadIdx.x);
  lanes[lane] = sum;
  for (int half = kRowLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace vqkernels::cuda
