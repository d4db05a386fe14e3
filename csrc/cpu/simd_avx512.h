// 512-bit vectors. Included only by the translation units compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../float16.h"

namespace vqkernels::cpu {
namespace {

template <class T>
struct Avx512;

template <>
struct Avx512<float> {
  using Scalar = float;
  using Index = int32_t;
  using Vector = __m512;
  using IndexVector = __m512i;
  using Mask = __mmask16;
  static constexpr int lanes = 16;
  static constexpr int registers = 32;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector broadcast(float x) { return _mm512_set1_ps(x); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static Vector load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Vector load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  // The first n elements, then zeros.
  static Vector load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
  static Vector load(const BFloat16* p, int64_t n) {
    const __m256i bits = _mm256_maskz_loadu_epi16((1u << n) - 1, p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Vector load(const Half* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << n) - 1, p)); }
  static void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  // b where either is NaN
  static Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static Mask greater(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static bool any(Mask m) { return m != 0; }
  static Mask either(Mask a, Mask b) { return a | b; }
  static IndexVector index(Index x) { return _mm512_set1_epi32(x); }
  static IndexVector index_select(Mask m, IndexVector yes, IndexVector no) { return _mm512_mask_mov_epi32(no, m, yes); }
  static void index_store(Index* p, IndexVector x) { _mm512_storeu_si512(p, x); }

  static void transpose(Vector (&v)[16]) {
    Vector t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
      v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
      v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
      v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
      v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }
};

template <>
struct Avx512<double> {
  using Scalar = double;
  using Index = int64_t;
  using Vector = __m512d;
  using IndexVector = __m512i;
  using Mask = __mmask8;
  static constexpr int lanes = 8;
  static constexpr int registers = 32;

  static Vector zero() { return _mm512_setzero_pd(); }
  static Vector broadcast(double x) { return _mm512_set1_pd(x); }
  static Vector load(const double* p) { return _mm512_loadu_pd(p); }
  static Vector load(const double* p, int64_t n) { return _mm512_maskz_loadu_pd((1u << n) - 1, p); }
  static void store(double* p, Vector x) { _mm512_storeu_pd(p, x); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_pd(a, b, c); }
  static Vector max(Vector a, Vector b) { return _mm512_max_pd(a, b); }
  static Mask greater(Vector a, Vector b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
  static bool any(Mask m) { return m != 0; }
  static Mask either(Mask a, Mask b) { return a | b; }
  static IndexVector index(Index x) { return _mm512_set1_epi64(x); }
  static IndexVector index_select(Mask m, IndexVector yes, IndexVector no) { return _mm512_mask_mov_epi64(no, m, yes); }
  static void index_store(Index* p, IndexVector x) { _mm512_storeu_si512(p, x); }

  static void transpose(Vector (&v)[8]) {
    Vector t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm512_unpacklo_pd(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_pd(v[i], v[i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      v[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
      v[i + 2] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
      v[i + 4] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
      v[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f64x2(v[i], v[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f64x2(v[i], v[i + 4], 0xdd);
    }
    for (int i = 0; i < 8; ++i) v[i] = t[i];
  }
};

}  // namespace
}  // namespace vqkernels::cpu
