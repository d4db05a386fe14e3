// Sums whose order of additions is part of the contract, so that every instruction set and device agrees.
#pragma once

#include <cmath>
#include <cstdint>

#include "../types.h"

namespace vqkernels::cpu {
namespace {

// Adds the lanes pairwise: i with i + n/2, then halves again. n is a power of two.
template <class T>
inline T pairwise_sum(T* lanes, int64_t n) {
  for (int64_t half = n / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Sum over d of a(d) * b(d): lane d % 16 is a chain of fma in ascending d, the lanes are added pairwise.
template <class T, class A, class B>
inline T row_dot(int64_t dim, const A& a, const B& b) {
  T lanes[kColumnLanes] = {};
  int64_t d = 0;
  for (; d + kColumnLanes <= dim; d += kColumnLanes) {
    for (int64_t i = 0; i < kColumnLanes; ++i) lanes[i] = std::fma(a(d + i), b(d + i), lanes[i]);
  }
  for (int64_t i = 0; d + i < dim; ++i) lanes[i] = std::fma(a(d + i), b(d + i), lanes[i]);
  return pairwise_sum(lanes, kColumnLanes);
}

// Sum of x[0, n): lane i % 256 adds in double in ascending i, the lanes are added pairwise.
template <class T>
inline double column_sum(const T* x, int64_t n) {
  double lanes[kRowLanes] = {};
  int64_t i = 0;
  for (; i + kRowLanes <= n; i += kRowLanes) {
    for (int64_t j = 0; j < kRowLanes; ++j) lanes[j] += x[i + j];
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += x[i + j];
  return pairwise_sum(lanes, kRowLanes);
}

}  // namespace
}  // namespace vqkernels::cpu
