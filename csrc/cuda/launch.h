// How kernels are launched, and what all of them need of the host. No torch header.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// The dynamic shared memory of a block. There is no static one, so that a launch says all a block has.
extern __shared__ __align__(16) unsigned char vqkernels_shared[];

namespace vqkernels::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("vqkernels: CUDA: ") + cudaGetErrorString(status));
}

// What a block may have of shared memory without asking for more.
constexpr int64_t kDefaultSharedBytes = 48 * 1024;

// Runs kernel(arguments...) on the stream; nothing to do for 0 blocks. Throws std::runtime_error where CUDA refuses.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) check(cudaErrorInvalidConfiguration);
  if (shared_bytes > kDefaultSharedBytes) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline bool is_aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }

// Cuts arrays out of a workspace; from a null workspace it only counts the bytes they take.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return array;
  }

  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 256;
  char* base_;
  int64_t bytes_ = 0;
};

// Threads that share a row: a power of two, so that no index has to be divided.
struct RowGroup {
  int log2;

  // No more threads than a row has columns, up to 1 << limit_log2.
  static RowGroup of(int64_t dim, int limit_log2) {
    RowGroup group{0};
    while (group.log2 < limit_log2 && (int64_t{1} << group.log2) < dim) ++group.log2;
    return group;
  }

  int64_t blocks(int64_t rows, int threads) const { return ceil_div(rows << log2, threads); }
  __device__ int64_t row() const { return (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) >> log2; }
  __device__ int64_t lane() const { return threadIdx.x & ((1u << log2) - 1); }
  __device__ int64_t size() const { return int64_t{1} << log2; }
};

}  // namespace vqkernels::cuda
