// One half of each row times the activation of the other (gated_activation.h), written once for all instruction sets.
#pragma once

#include "activations.h"
#include "gated_activation.h"
#include "modulation_kernel.h"

namespace vqkernels::cpu {
namespace {

template <class A, class F, bool kBias>
inline void gated_activation_rows(const GatedActivationProblem& p, const RowsOut& y, int64_t begin, int64_t end) {
  const int64_t dim = p.dim, gate = p.first ? 0 : dim, other = dim - gate;
  const A* bias = static_cast<const A*>(p.bias);
  const Buffer<A> work(3 * dim);
  for (int64_t row = begin; row < end; ++row) {
    const A* x = wide_row(p.x, row / p.length, row % p.length, 2 * dim, work.get());
    A* out = begin_row(y, row, dim, work.get() + 2 * dim);
    for_lanes<A>(dim, [&](int64_t d, auto part) VQKERNELS_INLINED {
      will_read(x + d);
      will_read(x + dim + d);
      will_write(out + d);
      const Lanes<A> u = load_biased<kBias>(x, bias, other + d, part);
      store_part(out + d, u * F::value(load_biased<kBias>(x, bias, gate + d, part)), part);
    });
    finish_row(y, row, dim, out);
  }
}

template <class A, class F, bool kBias>
inline void gated_activation_gradient(const GatedActivationProblem& p, const GatedActivationGradient& out,
                                      const Chunks& chunks, A* partial, int64_t begin, int64_t end) {
  const int64_t dim = p.dim, gate = p.first ? 0 : dim, other = dim - gate;
  const A* bias = static_cast<const A*>(p.bias);
  const Buffer<A> work(5 * dim);
  RowSums<A, 1> sums(out.sums, chunks, 2 * dim, partial);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    sums.add_chunk(chunk, [&](int64_t, int64_t row) {
      const int64_t b = row / p.length, l = row % p.length;
      const A* x = wide_row(p.x, b, l, 2 * dim, work.get());
      const A* grad_y = wide_row(out.grad_y, b, l, dim, work.get() + 2 * dim);
      A* grad_x = begin_row(out.grad_x, row, 2 * dim, work.get() + 3 * dim);
      A* sum = sums.place(0);
      for_lanes<A>(dim, [&](int64_t d, auto part) VQKERNELS_INLINED {
        will_read(x + d);
        will_read(x + dim + d);
        will_read(grad_y + d);
        const auto write = [&](int64_t place, const Lanes<A>& gradient) VQKERNELS_INLINED {
          will_write(grad_x + place);
          store_part(grad_x + place, gradient, part);
          if constexpr (kBias) store_part(sum + place, load_part(sum + place, part) + gradient, part);
        };
        const Lanes<A> g = load_part(grad_y + d, part);
        const ValueAndDerivative<A> f = F::both(load_biased<kBias>(x, bias, gate + d, part));
        write(other + d, g * f.value);
        write(gate + d, g * load_biased<kBias>(x, bias, other + d, part) * f.derivative);
      });
      finish_row(out.grad_x, row, 2 * dim, grad_x);
    });
  }
}

inline void forward(const GatedActivationProblem& p, const RowsOut& y, int64_t begin, int64_t end) {
  with_feed_forward(p, [&](auto zero, auto activation, auto has_bias) {
    gated_activation_rows<decltype(zero), decltype(activation), has_bias>(p, y, begin, end);
  });
}

inline void backward(const GatedActivationProblem& p, const GatedActivationGradient& out, const Chunks& chunks,
                     void* partial, int64_t begin, int64_t end) {
  with_feed_forward(p, [&](auto zero, auto activation, auto has_bias) {
    using A = decltype(zero);
    gated_activation_gradient<A, decltype(activation), has_bias>(p, out, chunks, static_cast<A*>(partial), begin, end);
  });
}

inline void reduce(const GatedActivationProblem& p, const GatedActivationGradient& out, const Chunks& chunks,
                   const void* partial, int64_t begin, int64_t end) {
  const int64_t columns = 2 * p.dim;
  if (p.wide) return reduce_sum(out.sums[0], 0, 1, chunks, columns, static_cast<const double*>(partial), begin, end);
  reduce_sum(out.sums[0], 0, 1, chunks, columns, static_cast<const float*>(partial), begin, end);
}

}  // namespace
}  // namespace vqkernels::cpu
