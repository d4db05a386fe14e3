// What CUDA kernels need, for a C++ compiler and the CPU: test-only, found first on the include path. Blocks run one
// after the other, the threads of a block as fibers that change places where they wait for each other.
//
// A launch fails, with a message, where threads wait at different places or for one that has ended, where nothing can
// go on, or where a block writes behind its shared memory. Shared memory is NaN at the beginning of every block, and
// threads and blocks can run in ascending or descending order, so that a missing barrier shows in the results.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1) : x(x_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerMultiprocessor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

namespace emulation {

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread);

// Waits for all threads of the block.
void synchronize_block(const char* place);

// Waits for all threads of the block; whether any of them brought true.
bool any_of_block(const char* place, bool predicate);

// Waits for the threads of the warp in mask, all of which must be here; what each of them brought, by lane.
const uint64_t* exchange(const char* place, unsigned mask, uint64_t value);

int lane();

// The device that launches see, with shared memory for a processor, and the order in which threads and blocks run.
void configure(int multiprocessors, int shared_bytes, bool descending);

// Launches since the last call.
int64_t count_launches();

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T maximum(T a, T b) {
  if (a == b) return std::signbit(a) ? b : a;
  return a > b || b != b ? a : b;
}

template <class T>
T shuffle(const char* place, unsigned mask, T value, int source) {
  T result;
  std::memcpy(&result, &exchange(place, mask, to_bits(value))[source], sizeof(T));
  return result;
}

template <class T>
unsigned match(const char* place, unsigned mask, T value) {
  const uint64_t* values = exchange(place, mask, to_bits(value));
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) same |= ((mask >> i & 1u) && values[i] == to_bits(value) ? 1u : 0u) << i;
  return same;
}

inline unsigned ballot(const char* place, unsigned mask, bool predicate) {
  const uint64_t* values = exchange(place, mask, predicate);
  unsigned set = 0;
  for (int i = 0; i < 32; ++i) set |= ((mask >> i & 1u) && values[i] != 0 ? 1u : 0u) << i;
  return set;
}

}  // namespace emulation

#define EMULATION_TEXT(x) #x
#define EMULATION_LINE(x) EMULATION_TEXT(x)
#define EMULATION_PLACE __FILE__ ":" EMULATION_LINE(__LINE__)

// As a device has it: NaN loses, and +0 is larger than -0.
#define fmaxf(a, b) ::emulation::maximum(a, b)
#define fmax(a, b) ::emulation::maximum(a, b)

#define __syncthreads() ::emulation::synchronize_block(EMULATION_PLACE)
#define __syncthreads_or(predicate) static_cast<int>(::emulation::any_of_block(EMULATION_PLACE, (predicate) != 0))
#define __syncwarp() static_cast<void>(::emulation::exchange(EMULATION_PLACE, 0xffffffffu, 0))
#define __shfl_sync(mask, value, source) ::emulation::shuffle(EMULATION_PLACE, mask, value, source)
#define __shfl_xor_sync(mask, value, other) \
  ::emulation::shuffle(EMULATION_PLACE, mask, value, ::emulation::lane() ^ (other))
#define __ballot_sync(mask, predicate) ::emulation::ballot(EMULATION_PLACE, mask, predicate)
#define __match_any_sync(mask, value) ::emulation::match(EMULATION_PLACE, mask, value)

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulation::run(reinterpret_cast<const void*>(kernel), *config, [&] { kernel(arguments...); });
}

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
