// Gather, error and gradient of rows (formulas: vector_quantize.h), written once; the compiler vectorises along the
// columns for each instruction set, in the fixed order of row_dot.
#pragma once

#include <algorithm>
#include <limits>

#include "../float16.h"
#include "fixed_order.h"
#include "row_gradient.h"
#include "vector_quantize.h"
#include "with_types.h"

namespace vqkernels::cpu {
namespace {

template <class T, class Z, class C>
inline void quantize_rows(const QuantizeRows& p, Z* quantized, T* errors) {
  const Z* z = static_cast<const Z*>(p.z);
  const C* codebook = static_cast<const C*>(p.codebook);
  for (int64_t row = 0; row < p.rows; ++row) {
    const Z* __restrict e = z + row * p.dim;
    Z* __restrict out = quantized + row * p.dim;
    if (p.indices[row] < 0) {
      const bool masked = p.mask != nullptr && !p.mask[row];
      Z fill;
      narrow(masked ? T(0) : std::numeric_limits<T>::quiet_NaN(), &fill);
      std::fill_n(out, p.dim, fill);
      errors[row] = 0;
      continue;
    }
    const C* __restrict c = codebook + p.indices[row] * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) narrow(widen(c[d]), out + d);
    const auto difference = [&](int64_t d) { return static_cast<T>(widen(e[d])) - static_cast<T>(widen(c[d])); };
    errors[row] = row_dot<T>(p.dim, difference, difference);
  }
}

template <class T, class Z, class C>
inline void quantize_rows_backward(const QuantizeRows& p, const Z* grad_quantized, Estimator estimator, T coefficient,
                                   Z* grad_z) {
  const Z* z = static_cast<const Z*>(p.z);
  const C* codebook = static_cast<const C*>(p.codebook);
  for (int64_t row = 0; row < p.rows; ++row) {
    Z* out = grad_z + row * p.dim;
    if (p.indices[row] < 0) {
      std::fill_n(out, p.dim, Z{});
      continue;
    }
    const Z* g = grad_quantized == nullptr ? nullptr : grad_quantized + row * p.dim;
    row_gradient(z + row * p.dim, codebook + p.indices[row] * p.dim, g, estimator, p.dim, coefficient, out);
  }
}

inline void quantize_rows_any(const QuantizeRows& p, void* quantized, void* errors) {
  with_types(p.z_type, p.codebook_type, [&](auto t, auto z, auto c) {
    using T = decltype(t);
    using Z = decltype(z);
    quantize_rows<T, Z, decltype(c)>(p, static_cast<Z*>(quantized), static_cast<T*>(errors));
  });
}

inline void quantize_rows_backward_any(const QuantizeRows& p, const void* grad_quantized, Estimator estimator,
                                       double coefficient, void* grad_z) {
  with_types(p.z_type, p.codebook_type, [&](auto t, auto z, auto c) {
    using T = decltype(t);
    using Z = decltype(z);
    quantize_rows_backward<T, Z, decltype(c)>(p, static_cast<const Z*>(grad_quantized), estimator,
                                              static_cast<T>(coefficient), static_cast<Z*>(grad_z));
  });
}

}  // namespace
}  // namespace vqkernels::cpu
