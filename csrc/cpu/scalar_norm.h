// q of the contract (nearest_code.h) and what it says of a row or code, as the scalar kernels compute them.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace vqkernels::cpu {
namespace {

template <class T>
inline T squared_norm(const T* x, int64_t dim) {
  T q = 0;
  for (int64_t d = 0; d < dim; ++d) q = std::fma(x[d], x[d], q);
  return q;
}

template <class T>
inline bool is_valid(T q) {
  return q <= std::numeric_limits<T>::max() / 4;
}

}  // namespace
}  // namespace vqkernels::cpu
