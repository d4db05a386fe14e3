// Kernels with one mistake each, which the emulation has to notice.
#include "faults.h"

#include "../../../csrc/cuda/launch.h"

namespace {

constexpr int kThreads = 64;

__device__ float* shared() { return reinterpret_cast<float*>(vqkernels_shared); }

// Reads its neighbour's value; right only with the barrier.
template <bool Barrier>
__global__ void neighbours(float* out) {
  shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (Barrier) __syncthreads();
  out[threadIdx.x] = shared()[(threadIdx.x + 1) % kThreads];
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void early_end(float* out) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void divergent_shuffle(float* out) {
  float value = 0;
  if (threadIdx.x % 2 == 0) value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

__global__ void overrun(float* out) {
  shared()[threadIdx.x + 1] = 0;
  out[threadIdx.x] = 0;
}

}  // namespace

void run_fault(const std::string& name, float* out) {
  using vqkernels::cuda::launch;
  const auto run = [&](void (*kernel)(float*)) { launch(kernel, 1, kThreads, kThreads * sizeof(float), nullptr, out); };
  if (name == "none") return run(neighbours<true>);
  if (name == "missing_barrier") return run(neighbours<false>);
  if (name == "divergent_barrier") return run(divergent_barrier);
  if (name == "early_end") return run(early_end);
  if (name == "divergent_shuffle") return run(divergent_shuffle);
  if (name == "overrun") return run(overrun);
  throw std::invalid_argument(name);
}
