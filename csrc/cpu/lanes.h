// 64 bytes of numbers, 16 floats or 8 doubles, as one value, on whatever vectors the translation unit is compiled for.
// What is written with it has the same operations in the same order on every instruction set, hence the same result
// to the last bit. Nothing is contracted: an fma stands where `fma` is written.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../float16.h"

// A build may define it as `inline`, which compiles faster; the results are the same.
#ifndef VQKERNELS_LANES_INLINE
#define VQKERNELS_LANES_INLINE inline __attribute__((always_inline))
#endif

namespace vqkernels::cpu {
namespace {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif
inline constexpr int kParts = 64 / kVectorBytes;

template <class A>
struct NativeVector;
template <>
struct NativeVector<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct NativeVector<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct NativeVector<int32_t> {
  typedef int32_t Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct NativeVector<int64_t> {
  typedef int64_t Type __attribute__((vector_size(kVectorBytes)));
};

// The integer as wide as a floating-point number.
template <class A>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using Type = int32_t;
};
template <>
struct IntegerOf<double> {
  using Type = int64_t;
};

template <class A>
struct Lanes {
  using Scalar = A;
  using Vector = typename NativeVector<A>::Type;
  static constexpr int64_t count = 64 / sizeof(A);
  Vector part[kParts];
};

// The comparison of two Lanes<A>: all bits set where it holds. Also integers in the lanes of A.
template <class A>
using IntegerLanes = Lanes<typename IntegerOf<A>::Type>;

template <class A, class Function>
VQKERNELS_LANES_INLINE Lanes<A> each_part(const Function& f) {
  Lanes<A> out;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) out.part[i] = f(i);
  return out;
}

template <class A>
VQKERNELS_LANES_INLINE Lanes<A> broadcast(A x) {
  const typename Lanes<A>::Vector zero = {};
  return each_part<A>([&](int) { return x - zero; });  // keeps the sign of zero
}

#define VQKERNELS_LANES_BINARY(op)                                                    \
  template <class A>                                                                  \
  VQKERNELS_LANES_INLINE Lanes<A> operator op(const Lanes<A>& a, const Lanes<A>& b) { \
    return each_part<A>([&](int i) { return a.part[i] op b.part[i]; });               \
  }
VQKERNELS_LANES_BINARY(+)
VQKERNELS_LANES_BINARY(-)
VQKERNELS_LANES_BINARY(*)
VQKERNELS_LANES_BINARY(/)
VQKERNELS_LANES_BINARY(&)
VQKERNELS_LANES_BINARY(|)
VQKERNELS_LANES_BINARY(^)
#undef VQKERNELS_LANES_BINARY

#define VQKERNELS_LANES_COMPARISON(op)                                                       \
  template <class A>                                                                         \
  VQKERNELS_LANES_INLINE IntegerLanes<A> operator op(const Lanes<A>& a, const Lanes<A>& b) { \
    using Integer = typename IntegerOf<A>::Type;                                             \
    using Vector = typename IntegerLanes<A>::Vector;                                         \
    return each_part<Integer>([&](int i) { return (Vector)(a.part[i] op b.part[i]); });      \
  }
VQKERNELS_LANES_COMPARISON(<)
VQKERNELS_LANES_COMPARISON(>)
VQKERNELS_LANES_COMPARISON(<=)
VQKERNELS_LANES_COMPARISON(>=)
VQKERNELS_LANES_COMPARISON(==)
VQKERNELS_LANES_COMPARISON(!=)
#undef VQKERNELS_LANES_COMPARISON

template <class A>
VQKERNELS_LANES_INLINE Lanes<A> operator-(const Lanes<A>& a) {
  return each_part<A>([&](int i) { return -a.part[i]; });
}

// Shifts of integer lanes; to the right with the sign.
template <class I>
VQKERNELS_LANES_INLINE Lanes<I> shift_left(const Lanes<I>& a, int bits) {
  return each_part<I>([&](int i) { return a.part[i] << bits; });
}
template <class I>
VQKERNELS_LANES_INLINE Lanes<I> shift_right(const Lanes<I>& a, int bits) {
  return each_part<I>([&](int i) { return a.part[i] >> bits; });
}

template <class A>
VQKERNELS_LANES_INLINE IntegerLanes<A> to_bits(const Lanes<A>& a) {
  using Vector = typename IntegerLanes<A>::Vector;
  return each_part<typename IntegerOf<A>::Type>([&](int i) { return (Vector)a.part[i]; });
}
template <class A>
VQKERNELS_LANES_INLINE Lanes<A> from_bits(const IntegerLanes<A>& a) {
  using Vector = typename Lanes<A>::Vector;
  return each_part<A>([&](int i) { return (Vector)a.part[i]; });
}

// Truncates; the values must fit.
template <class A>
VQKERNELS_LANES_INLINE IntegerLanes<A> to_integer(const Lanes<A>& a) {
  using Vector = typename IntegerLanes<A>::Vector;
  return each_part<typename IntegerOf<A>::Type>([&](int i) { return __builtin_convertvector(a.part[i], Vector); });
}
template <class A>
VQKERNELS_LANES_INLINE Lanes<A> to_floating(const IntegerLanes<A>& a) {
  using Vector = typename Lanes<A>::Vector;
  return each_part<A>([&](int i) { return __builtin_convertvector(a.part[i], Vector); });
}

template <class A>
VQKERNELS_LANES_INLINE Lanes<A> select(const IntegerLanes<A>& mask, const Lanes<A>& yes, const Lanes<A>& no) {
  return each_part<A>([&](int i) { return mask.part[i] ? yes.part[i] : no.part[i]; });
}

// a where a > b, else b: b where either is NaN.
template <class A>
VQKERNELS_LANES_INLINE Lanes<A> maximum(const Lanes<A>& a, const Lanes<A>& b) {
  return select<A>(a > b, a, b);
}
template <class A>
VQKERNELS_LANES_INLINE Lanes<A> minimum(const Lanes<A>& a, const Lanes<A>& b) {
  return select<A>(a < b, a, b);
}

template <class A>
VQKERNELS_LANES_INLINE Lanes<A> absolute(const Lanes<A>& a) {
  using Integer = typename IntegerOf<A>::Type;
  const Integer sign = Integer{1} << (8 * sizeof(A) - 1);
  return from_bits<A>(to_bits(a) & broadcast<Integer>(~sign));
}

#if defined(__AVX512F__)
VQKERNELS_LANES_INLINE Lanes<float> fma(const Lanes<float>& a, const Lanes<float>& b, const Lanes<float>& c) {
  return {{(NativeVector<float>::Type)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0])}};
}
VQKERNELS_LANES_INLINE Lanes<double> fma(const Lanes<double>& a, const Lanes<double>& b, const Lanes<double>& c) {
  return {{(NativeVector<double>::Type)_mm512_fmadd_pd((__m512d)a.part[0], (__m512d)b.part[0], (__m512d)c.part[0])}};
}
#elif defined(__FMA__)
VQKERNELS_LANES_INLINE Lanes<float> fma(const Lanes<float>& a, const Lanes<float>& b, const Lanes<float>& c) {
  return each_part<float>([&](int i) {
    return (NativeVector<float>::Type)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
  });
}
VQKERNELS_LANES_INLINE Lanes<double> fma(const Lanes<double>& a, const Lanes<double>& b, const Lanes<double>& c) {
  return each_part<double>([&](int i) {
    return (NativeVector<double>::Type)_mm256_fmadd_pd((__m256d)a.part[i], (__m256d)b.part[i], (__m256d)c.part[i]);
  });
}
#else
template <class A>
VQKERNELS_LANES_INLINE Lanes<A> fma(const Lanes<A>& a, const Lanes<A>& b, const Lanes<A>& c) {
  Lanes<A> out;
  for (int i = 0; i < kParts; ++i) {
    for (size_t j = 0; j < kVectorBytes / sizeof(A); ++j) {
      out.part[i][j] = std::fma(a.part[i][j], b.part[i][j], c.part[i][j]);
    }
  }
  return out;
}
#endif

// Loads as many numbers as there are lanes; narrow types are widened exactly.
template <class A>
VQKERNELS_LANES_INLINE Lanes<A> load(const A* p) {
  return each_part<A>([&](int i) {
    typename Lanes<A>::Vector part;
    std::memcpy(&part, p + i * (kVectorBytes / sizeof(A)), sizeof(part));
    return part;
  });
}
VQKERNELS_LANES_INLINE Lanes<float> load(const BFloat16* p) {
  constexpr int n = kVectorBytes / 4;
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  return from_bits<float>(each_part<int32_t>([&](int i) {
    Narrow bits;
    std::memcpy(&bits, p + i * n, sizeof(bits));
    return __builtin_convertvector(bits, NativeVector<int32_t>::Type) << 16;
  }));
}
VQKERNELS_LANES_INLINE Lanes<float> load(const Half* p) {
#if defined(__AVX512F__)
  __m256i bits;
  std::memcpy(&bits, p, sizeof(bits));
  return {{(NativeVector<float>::Type)_mm512_cvtph_ps(bits)}};
#elif defined(__F16C__)
  return each_part<float>([&](int i) {
    __m128i bits;
    std::memcpy(&bits, p + 8 * i, sizeof(bits));
    return (NativeVector<float>::Type)_mm256_cvtph_ps(bits);
  });
#else
  float wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = widen(p[i]);
  return load(wide);
#endif
}

// The first n numbers, then zeros; n is less than the number of lanes.
template <class T>
VQKERNELS_LANES_INLINE auto load(const T* p, int64_t n) {
  T padded[64 / sizeof(widen(T{}))] = {};
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) {
    _mm512_storeu_pd(padded, _mm512_maskz_loadu_pd(mask, p));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_storeu_ps(padded, _mm512_maskz_loadu_ps(mask, p));
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(padded), _mm256_maskz_loadu_epi16(mask, p));
  }
#else
  std::memcpy(padded, p, n * sizeof(T));
#endif
  return load(padded);
}

// Stores all lanes, rounded to nearest.
template <class A>
VQKERNELS_LANES_INLINE void store(A* p, const Lanes<A>& x) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) std::memcpy(p + i * (kVectorBytes / sizeof(A)), &x.part[i], kVectorBytes);
}
VQKERNELS_LANES_INLINE void store(BFloat16* p, const Lanes<float>& x) {
  constexpr int n = kVectorBytes / 4;
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    const Bits bits = (Bits)x.part[i];
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits not_a_number = (Bits)(x.part[i] != x.part[i]);
    const Narrow out = __builtin_convertvector((rounded & ~not_a_number) | (not_a_number & 0x7fc0u), Narrow);
    std::memcpy(p + i * n, &out, sizeof(out));
  }
}
VQKERNELS_LANES_INLINE void store(Half* p, const Lanes<float>& x) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_cvtps_ph((__m512)x.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &bits, sizeof(bits));
#elif defined(__F16C__)
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    const __m128i bits = _mm256_cvtps_ph((__m256)x.part[i], _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p + 8 * i, &bits, sizeof(bits));
  }
#else
  float wide[16];
  store(wide, x);
  for (int i = 0; i < 16; ++i) narrow(wide[i], p + i);
#endif
}

// The first n lanes; n is less than their number.
template <class T, class A>
VQKERNELS_LANES_INLINE void store(T* p, const Lanes<A>& x, int64_t n) {
  T padded[Lanes<A>::count];
  store(padded, x);
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, mask, _mm512_loadu_pd(padded));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, _mm512_loadu_ps(padded));
  } else {
    _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(padded)));
  }
#else
  std::memcpy(p, padded, n * sizeof(T));
#endif
}

// x rounded to what T holds.
template <class T, class A>
VQKERNELS_LANES_INLINE Lanes<A> rounded_to(const Lanes<A>& x) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return x;
  } else {
    T narrow_lanes[Lanes<A>::count];
    store(narrow_lanes, x);
    return load(narrow_lanes);
  }
}

// Adds the lanes pairwise: i with i + n/2, then halves again.
template <class A>
VQKERNELS_LANES_INLINE A sum(const Lanes<A>& x) {
  A lanes[Lanes<A>::count];
  store(lanes, x);
#pragma GCC unroll 4
  for (int64_t half = Lanes<A>::count / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace vqkernels::cpu
