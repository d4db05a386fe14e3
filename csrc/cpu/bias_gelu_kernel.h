// A bias and GELU (formulas: bias_gelu.h), written once for all instruction sets.
#pragma once

#include "activations.h"
#include "bias_gelu.h"
#include "modulation_kernel.h"

namespace vqkernels::cpu {
namespace {

template <class A, class F, bool kBias>
inline void bias_gelu_rows(const BiasGeluProblem& p, const RowsOut& y, int64_t begin, int64_t end) {
  const int64_t dim = p.dim;
  const A* bias = static_cast<const A*>(p.bias);
  const Buffer<A> work(2 * dim);
  for (int64_t row = begin; row < end; ++row) {
    const A* x = wide_row(p.x, row / p.length, row % p.length, dim, work.get());
    A* out = begin_row(y, row, dim, work.get() + dim);
    for_lanes<A>(dim, [&](int64_t d, auto part) VQKERNELS_INLINED {
      will_read(x + d);
      will_write(out + d);
      store_part(out + d, F::value(load_biased<kBias>(x, bias, d, part)), part);
    });
    finish_row(y, row, dim, out);
  }
}

template <class A, class F, bool kBias>
inline void bias_gelu_gradient(const BiasGeluProblem& p, const BiasGeluGradient& out, const Chunks& chunks, A* partial,
                               int64_t begin, int64_t end) {
  const int64_t dim = p.dim;
  const A* bias = static_cast<const A*>(p.bias);
  const Buffer<A> work(3 * dim);
  RowSums<A, 1> sums(out.sums, chunks, dim, partial);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    sums.add_chunk(chunk, [&](int64_t, int64_t row) {
      const int64_t b = row / p.length, l = row % p.length;
      const A* x = wide_row(p.x, b, l, dim, work.get());
      const A* grad_y = wide_row(out.grad_y, b, l, dim, work.get() + dim);
      A* grad_x = begin_row(out.grad_x, row, dim, work.get() + 2 * dim);
      A* sum = sums.place(0);
      for_lanes<A>(dim, [&](int64_t d, auto part) VQKERNELS_INLINED {
        will_read(x + d);
        will_read(grad_y + d);
        will_write(grad_x + d);
        const Lanes<A> g = load_part(grad_y + d, part) * F::both(load_biased<kBias>(x, bias, d, part)).derivative;
        store_part(grad_x + d, g, part);
        if constexpr (kBias) store_part(sum + d, load_part(sum + d, part) + g, part);
      });
      finish_row(out.grad_x, row, dim, grad_x);
    });
  }
}

inline void forward(const BiasGeluProblem& p, const RowsOut& y, int64_t begin, int64_t end) {
  with_feed_forward(p, [&](auto zero, auto activation, auto has_bias) {
    bias_gelu_rows<decltype(zero), decltype(activation), has_bias>(p, y, begin, end);
  });
}

inline void backward(const BiasGeluProblem& p, const BiasGeluGradient& out, const Chunks& chunks, void* partial,
                     int64_t begin, int64_t end) {
  with_feed_forward(p, [&](auto zero, auto activation, auto has_bias) {
    using A = decltype(zero);
    bias_gelu_gradient<A, decltype(activation), has_bias>(p, out, chunks, static_cast<A*>(partial), begin, end);
  });
}

inline void reduce(const BiasGeluProblem& p, const BiasGeluGradient& out, const Chunks& chunks, const void* partial,
                   int64_t begin, int64_t end) {
  if (p.wide) return reduce_sum(out.sums[0], 0, 1, chunks, p.dim, static_cast<const double*>(partial), begin, end);
  reduce_sum(out.sums[0], 0, 1, chunks, p.dim, static_cast<const float*>(partial), begin, end);
}

}  // namespace
}  // namespace vqkernels::cpu
