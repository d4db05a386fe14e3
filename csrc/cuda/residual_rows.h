// What the kernels of residual quantization share: rows of a type known when they run, and the rows of half a warp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../float16.h"
#include "../types.h"
#include "fixed_order.h"
#include "launch.h"

namespace vqkernels::cuda {

constexpr int kLog2Lanes = 4;  // half a warp works on a row: its threads are the lanes of row_dot
static_assert(1 << kLog2Lanes == kColumnLanes);

// Element i of x, which is double for double.
__device__ inline void load(const void* x, DType, int64_t i, double* out) { *out = static_cast<const double*>(x)[i]; }
__device__ inline void load(const void* x, DType type, int64_t i, float* out) {
  if (type == DType::bfloat16) {
    *out = widen(static_cast<const BFloat16*>(x)[i]);
  } else if (type == DType::float16) {
    *out = widen(static_cast<const Half*>(x)[i]);
  } else {
    *out = static_cast<const float*>(x)[i];
  }
}

__device__ inline void store(double value, DType, int64_t i, void* x) { static_cast<double*>(x)[i] = value; }
__device__ inline void store(float value, DType type, int64_t i, void* x) {
  if (type == DType::bfloat16) {
    narrow(value, static_cast<BFloat16*>(x) + i);
  } else if (type == DType::float16) {
    narrow(value, static_cast<Half*>(x) + i);
  } else {
    static_cast<float*>(x)[i] = value;
  }
}

template <class T>
__device__ inline T load(const void* x, DType type, int64_t i) {
  T value;
  load(x, type, i, &value);
  return value;
}

// Columns lane, lane + kColumnLanes, ... of rows that half a warp works on, as memory that no other thread looks at: in
// shared memory, or, where rows are too long for it, in work memory.
template <class T>
struct OwnColumns {
  T* base;
  int64_t stride;
  __device__ T& operator()(int64_t d) const { return base[(d >> kLog2Lanes) * stride]; }
};

// How `arrays` rows for every half of a warp are kept. Fewer threads a block leave more memory for each.
struct OwnColumnsPlan {
  int64_t columns;  // a thread has of each array
  int64_t arrays;
  int threads;
  int64_t shared_bytes;  // 0: in work memory

  OwnColumnsPlan(int64_t dim, int64_t arrays_, int64_t value_bytes)
      : columns(ceil_div(dim, kColumnLanes)), arrays(arrays_), threads(256) {
    const int64_t thread_bytes = columns * arrays * value_bytes;
    while (threads > kWarpSize && threads * thread_bytes > kDefaultSharedBytes) threads /= 2;
    shared_bytes = threads * thread_bytes <= kDefaultSharedBytes ? threads * thread_bytes : 0;
  }
  int64_t blocks(int64_t rows) const { return RowGroup{kLog2Lanes}.blocks(rows, threads); }
  // Values of work memory; rows are rounded up, for every thread of the launch has its own.
  int64_t values(int64_t rows) const { return shared_bytes > 0 ? 0 : blocks(rows) * threads * columns * arrays; }

  // workspace: of values(rows) values, unless shared memory is used.
  template <class T>
  __device__ OwnColumns<T> array(int64_t n, T* workspace) const {
    if (shared_bytes > 0) {
      return {reinterpret_cast<T*>(vqkernels_shared) + n * columns * threads + threadIdx.x, threads};
    }
    const RowGroup group{kLog2Lanes};
    return {workspace + (group.row() * arrays + n) * columns * kColumnLanes + group.lane(), kColumnLanes};
  }
};

}  // namespace vqkernels::cuda
