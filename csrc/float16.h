// bfloat16 and IEEE half as bit patterns: exact widening, round-to-nearest-even narrowing, on host and device alike.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VQKERNELS_INLINE static __host__ __device__ inline
#else
#define VQKERNELS_INLINE static inline
#endif

namespace vqkernels {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

VQKERNELS_INLINE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

VQKERNELS_INLINE uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

VQKERNELS_INLINE float widen(float x) { return x; }
VQKERNELS_INLINE double widen(double x) { return x; }
VQKERNELS_INLINE float widen(BFloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }

VQKERNELS_INLINE float widen(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // Inf and NaN keep their payload
    return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude < 0x400u) {  // subnormal, without passing through a float32 subnormal
    return float_from_bits(sign | bits_from_float(static_cast<float>(magnitude) * 0x1p-24f));
  }
  return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
}

VQKERNELS_INLINE void narrow(float x, float* out) { *out = x; }
VQKERNELS_INLINE void narrow(double x, double* out) { *out = x; }

VQKERNELS_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

VQKERNELS_INLINE void narrow(float x, Half* out) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to Inf
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves exactly the ten fraction bits, correctly rounded.
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace vqkernels
