// The gated residual (formulas: gate_residual.h), written once for all instruction sets.
#pragma once

#include "gate_residual.h"
#include "modulation_kernel.h"

namespace vqkernels::cpu {
namespace {

template <class A>
inline void gate_residual_rows(const GateResidualProblem& p, const RowsOut& residual, int64_t begin, int64_t end) {
  const int64_t dim = p.dim;
  const Buffer<A> work(4 * dim);
  WideRows<A> gates(p.gate, dim, work.get() + 2 * dim, nullptr);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.length, l = row % p.length;
    const A* x = wide_row(p.x, b, l, dim, work.get());
    const A* branch = wide_row(p.branch, b, l, dim, work.get() + dim);
    gates.move_to(b, l);
    const A* gate = gates.row();
    A* out = begin_row(residual, row, dim, work.get() + 3 * dim);
    for_lanes<A>(dim, [&](int64_t d, auto part) VQKERNELS_INLINED {
      store_part(out + d, fma(load_part(gate + d, part), load_part(branch + d, part), load_part(x + d, part)), part);
    });
    finish_row(residual, row, dim, out);
  }
}

template <class A>
inline void gate_residual_gradient(const GateResidualProblem& p, const GateResidualGradient& out, const Chunks& chunks,
                                   A* partial, int64_t begin, int64_t end) {
  const int64_t dim = p.dim;
  const Buffer<A> work(4 * dim);
  WideRows<A> gates(p.gate, dim, work.get() + 2 * dim, nullptr);
  RowSums<A, 1> sums(out.sums, chunks, dim, partial);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    sums.add_chunk(chunk, [&](int64_t b, int64_t l) {
      const int64_t row = b * p.length + l;
      const A* grad = wide_row(out.grad_residual, b, l, dim, work.get());
      const A* branch = wide_row(p.branch, b, l, dim, work.get() + dim);
      gates.move_to(b, l);
      const A* gate = gates.row();
      A* grad_branch = begin_row(out.grad_branch, row, dim, work.get() + 3 * dim);
      A* sum = sums.place(0);
      for_lanes<A>(dim, [&](int64_t d, auto part) VQKERNELS_INLINED {
        const Lanes<A> g = load_part(grad + d, part);
        store_part(grad_branch + d, g * load_part(gate + d, part), part);
        store_part(sum + d, fma(g, load_part(branch + d, part), load_part(sum + d, part)), part);
      });
      finish_row(out.grad_branch, row, dim, grad_branch);
    });
  }
}

inline void forward(const GateResidualProblem& p, const RowsOut& residual, int64_t begin, int64_t end) {
  if (p.wide) return gate_residual_rows<double>(p, residual, begin, end);
  gate_residual_rows<float>(p, residual, begin, end);
}

inline void backward(const GateResidualProblem& p, const GateResidualGradient& out, const Chunks& chunks, void* partial,
                     int64_t begin, int64_t end) {
  if (p.wide) return gate_residual_gradient(p, out, chunks, static_cast<double*>(partial), begin, end);
  gate_residual_gradient(p, out, chunks, static_cast<float*>(partial), begin, end);
}

inline void reduce(const GateResidualProblem& p, const GateResidualGradient& out, const Chunks& chunks,
                   const void* partial, int64_t begin, int64_t end) {
  if (p.wide) return reduce_sum(out.sums[0], 0, 1, chunks, p.dim, static_cast<const double*>(partial), begin, end);
  reduce_sum(out.sums[0], 0, 1, chunks, p.dim, static_cast<const float*>(partial), begin, end);
}

}  // namespace
}  // namespace vqkernels::cpu
