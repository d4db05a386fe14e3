// The gradient through the rotation of a row onto its code. Formula: cpu/vector_quantize.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../types.h"
#include "fixed_order.h"

namespace vqkernels::cuda {

template <class T>
__device__ inline T at_least(T x, T bound) {
  return x < bound ? bound : x;
}

// e(d), c(d), g(d): row, code and gradient of the quantized row; write(d, gradient) for the columns of a thread, each
// after the last use of e, c and g at d. Half a warp works on a row, as in row_dot.
template <class T, class E, class C, class G, class Write>
__device__ inline void rotate_gradient(const E& e, const C& c, const G& g, int64_t dim, int64_t lane, T coefficient,
                                       const Write& write) {
  constexpr T kEps = T(1e-6);
  const T norm_c = root(row_dot<T>(dim, lane, c, c));
  const T divisor_e = at_least(root(row_dot<T>(dim, lane, e, e)), kEps);
  const T divisor_c = at_least(norm_c, kEps);
  const auto u = [&](int64_t d) { return e(d) / divisor_e; };
  const auto q = [&](int64_t d) { return c(d) / divisor_c; };
  const auto w = [&](int64_t d) { return u(d) + q(d); };
  const T divisor_w = at_least(root(row_dot<T>(dim, lane, w, w)), kEps);
  const T gw = row_dot<T>(dim, lane, g, w) / divisor_w;
  const T gq = row_dot<T>(dim, lane, g, q);
  const T scale = norm_c / divisor_e;
  for (int64_t d = lane; d < dim; d += kColumnLanes) {
    const T rotated = g(d) - 2 * gw * (w(d) / divisor_w) + 2 * gq * u(d);
    write(d, scale * rotated + coefficient * (e(d) - c(d)));
  }
}

}  // namespace vqkernels::cuda
