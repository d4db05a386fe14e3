// The gradient of one row with respect to itself (formulas: vector_quantize.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../float16.h"
#include "../types.h"
#include "fixed_order.h"

namespace vqkernels::cpu {
namespace {

template <class T, class E, class C, class G, class Out>
inline void rotate_gradient(const E* e, const C* c, const G* g, int64_t dim, T coefficient, Out* out) {
  constexpr T kEps = T(1e-6);
  const auto ed = [&](int64_t d) { return static_cast<T>(widen(e[d])); };
  const auto cd = [&](int64_t d) { return static_cast<T>(widen(c[d])); };
  const auto gd = [&](int64_t d) { return static_cast<T>(widen(g[d])); };
  const T norm_c = std::sqrt(row_dot<T>(dim, cd, cd));
  const T divisor_e = std::max(std::sqrt(row_dot<T>(dim, ed, ed)), kEps);
  const T divisor_c = std::max(norm_c, kEps);
  const auto u = [&](int64_t d) { return ed(d) / divisor_e; };
  const auto q = [&](int64_t d) { return cd(d) / divisor_c; };
  const auto w = [&](int64_t d) { return u(d) + q(d); };
  const T divisor_w = std::max(std::sqrt(row_dot<T>(dim, w, w)), kEps);
  const T gw = row_dot<T>(dim, gd, w) / divisor_w;
  const T gq = row_dot<T>(dim, gd, q);
  const T scale = norm_c / divisor_e;
  for (int64_t d = 0; d < dim; ++d) {
    const T rotated = gd(d) - 2 * gw * (w(d) / divisor_w) + 2 * gq * u(d);
    narrow(scale * rotated + coefficient * (ed(d) - cd(d)), out + d);
  }
}

// Of row e that chose code c; g: gradient of its quantized row, null: zero.
template <class T, class E, class C, class G, class Out>
inline void row_gradient(const E* __restrict e, const C* __restrict c, const G* __restrict g, Estimator estimator,
                         int64_t dim, T coefficient, Out* __restrict out) {
  if (g == nullptr || estimator == Estimator::none) {
    for (int64_t d = 0; d < dim; ++d) {
      narrow(coefficient * (static_cast<T>(widen(e[d])) - static_cast<T>(widen(c[d]))), out + d);
    }
  } else if (estimator == Estimator::straight_through) {
    for (int64_t d = 0; d < dim; ++d) {
      const T difference = static_cast<T>(widen(e[d])) - static_cast<T>(widen(c[d]));
      narrow(static_cast<T>(widen(g[d])) + coefficient * difference, out + d);
    }
  } else {
    rotate_gradient(e, c, g, dim, coefficient, out);
  }
}

}  // namespace
}  // namespace vqkernels::cpu
