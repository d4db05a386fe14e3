// One level of residual quantization, and the gradient of all levels, written once; the compiler vectorises along the
// columns for each instruction set, in the fixed order of row_dot.
#pragma once

#include <algorithm>

#include "../float16.h"
#include "buffer.h"
#include "fixed_order.h"
#include "residual_quantize.h"
#include "row_gradient.h"
#include "with_types.h"

namespace vqkernels::cpu {
namespace {

// Dim is dim where that is known beforehand, else 0.
template <int64_t Dim, class T, class C>
inline void residual_step(const ResidualStep& p) {
  const int64_t dim = Dim > 0 ? Dim : p.dim;
  const C* codes = static_cast<const C*>(p.codes);
  T* errors = static_cast<T*>(p.errors);
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.indices[row] < 0) {
      if (errors != nullptr) errors[row] = 0;
      continue;
    }
    const C* __restrict c = codes + p.indices[row] * dim;
    T* __restrict r = static_cast<T*>(p.residual) + row * dim;
    for (int64_t d = 0; d < dim; ++d) r[d] -= static_cast<T>(widen(c[d]));
    if (p.sum != nullptr) {
      T* __restrict sum = static_cast<T*>(p.sum) + row * dim;
      if (p.is_first) {
        for (int64_t d = 0; d < dim; ++d) sum[d] = widen(c[d]);
      } else {
        for (int64_t d = 0; d < dim; ++d) sum[d] += static_cast<T>(widen(c[d]));
      }
    }
    if (errors == nullptr) continue;
    if constexpr (Dim == 8) {
      T lanes[8];  // of row_dot's sixteen, where the others are zero
      for (int64_t d = 0; d < 8; ++d) lanes[d] = r[d] * r[d];
      errors[row] = pairwise_sum(lanes, 8);
    } else {
      const auto left = [&](int64_t d) { return r[d]; };
      errors[row] = row_dot<T>(dim, left, left);
    }
  }
}

template <class T, class Z, class C>
inline void residual_backward(const ResidualRows& p, const Z* grad_quantized, Estimator estimator,
                              const double* coefficients, Z* grad_z) {
  const Z* z = static_cast<const Z*>(p.z);
  const Buffer<T> residual(p.dim), term(p.dim), total(p.dim);
  for (int64_t row = 0; row < p.rows; ++row) {
    const Z* g = grad_quantized == nullptr ? nullptr : grad_quantized + row * p.dim;
    const C* codes = static_cast<const C*>(p.codebooks);
    for (int64_t d = 0; d < p.dim; ++d) residual[d] = widen(z[row * p.dim + d]);
    std::fill_n(total.get(), p.dim, T(0));
    bool is_first = true;
    for (int64_t q = 0; q < p.levels; codes += p.sizes[q++] * p.dim) {
      const int64_t index = p.indices[row * p.levels + q];
      if (index < 0) continue;
      const C* c = codes + index * p.dim;
      T* out = is_first ? total.get() : term.get();
      row_gradient(residual.get(), c, g, estimator, p.dim, static_cast<T>(coefficients[q]), out);
      if (!is_first) {
        for (int64_t d = 0; d < p.dim; ++d) total[d] += term[d];
      }
      for (int64_t d = 0; d < p.dim; ++d) residual[d] -= static_cast<T>(widen(c[d]));
      is_first = false;
    }
    for (int64_t d = 0; d < p.dim; ++d) narrow(total[d], grad_z + row * p.dim + d);
  }
}

inline void residual_step_any(const ResidualStep& p) {
  with_types(p.codebook_type, p.codebook_type, [&](auto t, auto, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    return p.dim == 8 ? residual_step<8, T, C>(p) : residual_step<0, T, C>(p);
  });
}

inline void residual_backward_any(const ResidualRows& p, const void* grad_quantized, Estimator estimator,
                                  const double* coefficients, void* grad_z) {
  with_types(p.z_type, p.codebook_type, [&](auto t, auto z, auto c) {
    using T = decltype(t);
    using Z = decltype(z);
    residual_backward<T, Z, decltype(c)>(p, static_cast<const Z*>(grad_quantized), estimator, coefficients,
                                         static_cast<Z*>(grad_z));
  });
}

}  // namespace
}  // namespace vqkernels::cpu
