// 256-bit vectors. Included only by the translation units compiled for AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../float16.h"

namespace vqkernels::cpu {
namespace {

template <class T>
struct Avx2;

template <>
struct Avx2<float> {
  using Scalar = float;
  using Index = int32_t;
  using Vector = __m256;
  using IndexVector = __m256i;
  using Mask = __m256;
  static constexpr int lanes = 8;
  static constexpr int registers = 16;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector broadcast(float x) { return _mm256_set1_ps(x); }
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static Vector load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Vector load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  // The first n elements, then zeros.
  static Vector load(const float* p, int64_t n) { return _mm256_maskload_ps(p, lanes_below(n)); }
  template <class Narrow>
  static Vector load(const Narrow* p, int64_t n) {
    Narrow part[8] = {};
    std::memcpy(part, p, n * sizeof(Narrow));
    return load(part);
  }
  static void store(float* p, Vector x) { _mm256_storeu_ps(p, x); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  // b where either is NaN
  static Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
  static Mask greater(Vector a, Vector b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
  static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static IndexVector index(Index x) { return _mm256_set1_epi32(x); }
  static IndexVector index_select(Mask m, IndexVector yes, IndexVector no) {
    return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m));
  }
  static void index_store(Index* p, IndexVector x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

  static __m256i lanes_below(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static void transpose(Vector (&v)[8]) {
    Vector t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      v[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      v[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      v[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      v[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) v[i] = t[i];
  }
};

template <>
struct Avx2<double> {
  using Scalar = double;
  using Index = int64_t;
  using Vector = __m256d;
  using IndexVector = __m256i;
  using Mask = __m256d;
  static constexpr int lanes = 4;
  static constexpr int registers = 16;

  static Vector zero() { return _mm256_setzero_pd(); }
  static Vector broadcast(double x) { return _mm256_set1_pd(x); }
  static Vector load(const double* p) { return _mm256_loadu_pd(p); }
  static Vector load(const double* p, int64_t n) {
    return _mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)));
  }
  static void store(double* p, Vector x) { _mm256_storeu_pd(p, x); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_pd(a, b, c); }
  static Vector max(Vector a, Vector b) { return _mm256_max_pd(a, b); }
  static Mask greater(Vector a, Vector b) { return _mm256_cmp_pd(a, b, _CMP_GT_OQ); }
  static bool any(Mask m) { return _mm256_movemask_pd(m) != 0; }
  static Mask either(Mask a, Mask b) { return _mm256_or_pd(a, b); }
  static IndexVector index(Index x) { return _mm256_set1_epi64x(x); }
  static IndexVector index_select(Mask m, IndexVector yes, IndexVector no) {
    return _mm256_blendv_epi8(no, yes, _mm256_castpd_si256(m));
  }
  static void index_store(Index* p, IndexVector x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

  static void transpose(Vector (&v)[4]) {
    const Vector a = _mm256_unpacklo_pd(v[0], v[1]);
    const Vector b = _mm256_unpackhi_pd(v[0], v[1]);
    const Vector c = _mm256_unpacklo_pd(v[2], v[3]);
    const Vector d = _mm256_unpackhi_pd(v[2], v[3]);
    v[0] = _mm256_permute2f128_pd(a, c, 0x20);
    v[1] = _mm256_permute2f128_pd(b, d, 0x20);
    v[2] = _mm256_permute2f128_pd(a, c, 0x31);
    v[3] = _mm256_permute2f128_pd(b, d, 0x31);
  }
};

}  // namespace
}  // namespace vqkernels::cpu
