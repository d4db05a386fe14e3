// The norm chain (formulas: norm_modulate.h), written once for all instruction sets.
#pragma once

#include <cmath>
#include <type_traits>

#include "modulation_kernel.h"
#include "norm_modulate.h"

namespace vqkernels::cpu {
namespace {

// Rows of work memory, by what they hold.
enum Scratch {
  kWideX,
  kWideBranch,
  kWideGate,
  kWideShift,
  kWideScale = kWideShift + 2,
  kFactor = kWideScale + 2,  // 1 + scale
  kResidual = kFactor + 2,
  kOut,
  kNormalized,
  kGradNormalized,
  kWideGrad,
  kWideGradResidual = kWideGrad + 2,
  kOnes,
  kZeros,
  kScratchRows
};

template <class A>
class Workspace {
 public:
  explicit Workspace(int64_t dim) : pitch_((dim + 15) / 16 * 16), memory_(kScratchRows * pitch_) {
    std::fill_n(row(kOnes), dim, A(1));
    std::fill_n(row(kZeros), dim, A(0));
  }
  A* row(int i) const { return memory_.get() + i * pitch_; }

 private:
  const int64_t pitch_;
  const Buffer<A> memory_;
};

// Calls body(d, part, sums) as for_lanes does and returns the totals of what it adds to sums[0] to sums[kCount - 1].
// There are four of each in turn, so that additions need not wait for one another.
template <class A, int kCount, class Body>
VQKERNELS_LANES_INLINE std::array<A, kCount> sum_lanes(int64_t dim, const Body& body) {
  constexpr int64_t n = Lanes<A>::count;
  Lanes<A> sums[4][kCount];
#pragma GCC unroll 8
  for (int i = 0; i < 4 * kCount; ++i) sums[i / kCount][i % kCount] = broadcast(A(0));
  int64_t d = 0;
  for (; d + 4 * n <= dim; d += 4 * n) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) body(d + i * n, WholeLanes{}, sums[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, d += n) {
    if (d + n <= dim) {
      body(d, WholeLanes{}, sums[i]);
    } else if (d < dim) {
      body(d, SomeLanes{dim - d}, sums[i]);
    }
  }
  std::array<A, kCount> totals;
  for (int k = 0; k < kCount; ++k) totals[k] = sum((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
  return totals;
}

// What modulates the row at hand.
template <class A>
class Modulation {
 public:
  Modulation(const NormModulateProblem& p, int i, const Workspace<A>& work)
      : factor_(work.row(kOnes)),
        shift_(p.shift[i], p.dim, work.row(kWideShift + i), work.row(kZeros)),
        scale_(p.scale[i], p.dim, work.row(kWideScale + i), nullptr),
        dim_(p.dim),
        made_(work.row(kFactor + i)) {}

  void move_to(int64_t b, int64_t l) {
    shift_.move_to(b, l);
    if (!scale_.move_to(b, l)) return;
    const A* scale = scale_.row();
    for_lanes<A>(dim_, [&](int64_t d, auto part) VQKERNELS_INLINED {
      store_part(made_ + d, broadcast(A(1)) + load_part(scale + d, part), part);
    });
    factor_ = made_;
  }
  const A* shift() const { return shift_.row(); }
  const A* factor() const { return factor_; }  // 1 + scale

 private:
  const A* factor_;
  WideRows<A> shift_;
  WideRows<A> scale_;
  const int64_t dim_;
  A* const made_;
};

template <class A>
struct Statistics {
  A mean;
  A rstd;
};

// Of a row of sum `total`; R: where it was not made from a branch, the type it is stored in.
template <class A, class R>
inline Statistics<A> row_statistics(const R* r, A total, int64_t dim, bool rms, A eps) {
  const A count = static_cast<A>(dim);
  A mean = 0, squares;
  if (rms) {
    squares = sum_lanes<A, 1>(dim, [&](int64_t d, auto part, Lanes<A>* sum) VQKERNELS_INLINED {
      const Lanes<A> value = load_part(r + d, part);
      sum[0] = fma(value, value, sum[0]);
    })[0];
  } else {
    mean = total / count;
    const Lanes<A> means = broadcast(mean);
    const auto sums = sum_lanes<A, 2>(dim, [&](int64_t d, auto part, Lanes<A>* sum) VQKERNELS_INLINED {
      const Lanes<A> difference = load_filled(r + d, mean, part) - means;
      sum[0] = sum[0] + difference;
      sum[1] = fma(difference, difference, sum[1]);
    });
    mean += sums[0] / count;
    squares = std::max(sums[1] - sums[0] * (sums[0] / count), A(0));
  }
  return {mean, A(1) / std::sqrt(squares / count + eps)};
}

template <class A, class R, class S, bool kAffine>
inline void modulate_row(const R* r, const Statistics<A>& statistics, const A* weight, const A* bias, const A* factor,
                         const A* shift, int64_t dim, S* y) {
  const Lanes<A> means = broadcast(statistics.mean), rstds = broadcast(statistics.rstd);
  for_lanes<A>(dim, [&](int64_t d, auto part) VQKERNELS_INLINED {
    Lanes<A> n = (load_part(r + d, part) - means) * rstds;
    if constexpr (kAffine) n = fma(n, load_part(weight + d, part), load_part(bias + d, part));
    store_part(y + d, fma(n, load_part(factor + d, part), load_part(shift + d, part)), part);
    fetch(r + dim + d);
    fetch(y + dim + d);
  });
}

template <class A, class S>
inline void norm_modulate_rows(const NormModulateProblem& p, const NormModulateResult& out, int64_t begin,
                               int64_t end) {
  const int64_t dim = p.dim;
  const Workspace<A> work(dim);
  const A* weight = p.weight ? static_cast<const A*>(p.weight) : work.row(kOnes);
  const A* bias = p.bias ? static_cast<const A*>(p.bias) : work.row(kZeros);
  WideRows<A> gates(p.gate, dim, work.row(kWideGate), work.row(kOnes));
  Modulation<A> modulations[2] = {{p, 0, work}, {p, 1, work}};

  // r: the row to normalize, total: its sum.
  const auto normalize = [&](int64_t b, int64_t l, const auto* r, A total) {
    using R = std::decay_t<decltype(*r)>;
    const int64_t row = b * p.length + l;
    const Statistics<A> statistics = row_statistics(r, total, dim, p.rms, static_cast<A>(p.eps));
    if (out.mean) static_cast<A*>(out.mean)[row] = statistics.mean;
    static_cast<A*>(out.rstd)[row] = statistics.rstd;
    const auto modulate = p.weight || p.bias ? modulate_row<A, R, S, true> : modulate_row<A, R, S, false>;
    for (int i = 0; i < p.modulations; ++i) {
      modulations[i].move_to(b, l);
      S* y = write_row<S>(out.y[i], row, dim, work.row(kOut));
      modulate(r, statistics, weight, bias, modulations[i].factor(), modulations[i].shift(), dim, y);
      finish_row(out.y[i], row, dim, y);
    }
  };

  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.length, l = row % p.length;
    const S* x = read_row<S>(p.x, b, l, dim, work.row(kWideX));
    if (p.branch.data) {
      const S* branch = read_row<S>(p.branch, b, l, dim, work.row(kWideBranch));
      gates.move_to(b, l);
      const A* gate = gates.row();
      S* residual = write_row<S>(out.residual, row, dim, work.row(kResidual));
      A* wide = work.row(kResidual);
      const auto totals = sum_lanes<A, 1>(dim, [&](int64_t d, auto part, Lanes<A>* sum) VQKERNELS_INLINED {
        const Lanes<A> r = fma(load_part(gate + d, part), load_part(branch + d, part), load_part(x + d, part));
        store_part(residual + d, r, part);
        if constexpr (sizeof(S) != sizeof(A)) store_part(wide + d, r, part);
        sum[0] = sum[0] + r;
        fetch(branch + dim + d);
        fetch(residual + dim + d);
      });
      finish_row(out.residual, row, dim, residual);
      if constexpr (sizeof(S) != sizeof(A)) {
        normalize(b, l, static_cast<const A*>(wide), totals[0]);
      } else {
        normalize(b, l, static_cast<const A*>(residual), totals[0]);
      }
    } else {
      A total = 0;
      if (!p.rms) {
        total = sum_lanes<A, 1>(dim, [&](int64_t d, auto part, Lanes<A>* sum)
                                         VQKERNELS_INLINED { sum[0] = sum[0] + load_part(x + d, part); })[0];
      }
      normalize(b, l, x, total);
    }
  }
}

// The rows that the gradient of one row is made of, and where it goes.
template <class A, class S>
struct GradientRow {
  const S* x;
  const S* branch;
  const A* gate;
  const S* grad_y[2];
  const A* factor[2];
  const A* weight;
  const A* bias;
  const S* grad_residual;
  A mean;
  A rstd;
  bool rms;
  A* h;   // normalized row
  A* dh;  // its gradient
  S* grad_x;
  S* grad_branch;
  A* sums[kSums];
};

template <class A, class S, bool kBranch, bool kAffine, bool kTwo>
inline void gradient_row(const GradientRow<A, S>& row, int64_t dim) {
  const GradientRow<A, S> g = row;  // stores do not make the compiler read its pointers again
  const Lanes<A> means = broadcast(g.mean), rstds = broadcast(g.rstd);
  Lanes<A> of_dh = broadcast(A(0)), of_dh_h = broadcast(A(0));
  for_lanes<A>(dim, [&](int64_t d, auto part) VQKERNELS_INLINED {
    const auto add = [&](Sum sum, const Lanes<A>& value) {
      store_part(g.sums[sum] + d, load_part(g.sums[sum] + d, part) + value, part);
    };
    const auto add_product = [&](Sum sum, const Lanes<A>& a, const Lanes<A>& b) {
      store_part(g.sums[sum] + d, fma(a, b, load_part(g.sums[sum] + d, part)), part);
    };
    Lanes<A> r = load_filled(g.x + d, g.mean, part);
    if constexpr (kBranch) r = fma(load_part(g.gate + d, part), load_part(g.branch + d, part), r);
    const Lanes<A> h = (r - means) * rstds;
    Lanes<A> n = h;
    if constexpr (kAffine) n = fma(h, load_part(g.weight + d, part), load_part(g.bias + d, part));
    const Lanes<A> dy = load_part(g.grad_y[0] + d, part);
    add(kShift, dy);
    add_product(kScale, dy, n);
    Lanes<A> dn = dy * load_part(g.factor[0] + d, part);
    if constexpr (kTwo) {
      const Lanes<A> dy2 = load_part(g.grad_y[1] + d, part);
      add(kShift2, dy2);
      add_product(kScale2, dy2, n);
      dn = fma(dy2, load_part(g.factor[1] + d, part), dn);
    }
    Lanes<A> dh = dn;
    if constexpr (kAffine) {
      add_product(kWeight, dn, h);
      add(kBias, dn);
      dh = dn * load_part(g.weight + d, part);
    }
    store_part(g.dh + d, dh, part);
    fetch_far(g.x + dim + d);
    fetch_far(g.grad_x + dim + d);
    if constexpr (kBranch) fetch_far(g.branch + dim + d);
    if constexpr (kBranch) store_part(g.h + d, h, part);
    of_dh = of_dh + dh;
    of_dh_h = fma(dh, h, of_dh_h);
  });
  const A count = static_cast<A>(dim);
  const Lanes<A> mean_dh = broadcast(g.rms ? A(0) : sum(of_dh) / count);
  const Lanes<A> mean_dh_h = broadcast(sum(of_dh_h) / count);
  for_lanes<A>(dim, [&](int64_t d, auto part) VQKERNELS_INLINED {
    Lanes<A> h;
    if constexpr (kBranch) {
      h = load_part(g.h + d, part);
    } else {
      h = (load_part(g.x + d, part) - means) * rstds;
    }
    const Lanes<A> centered = load_part(g.dh + d, part) - mean_dh - h * mean_dh_h;
    const Lanes<A> dr = fma(rstds, centered, load_part(g.grad_residual + d, part));
    store_part(g.grad_x + d, dr, part);
    fetch_far(g.grad_y[0] + dim + d);
    fetch_far(g.grad_residual + dim + d);
    if constexpr (kBranch) fetch_far(g.grad_branch + dim + d);
    if constexpr (kBranch) {
      store_part(g.grad_branch + d, dr * load_part(g.gate + d, part), part);
      A* sum = g.sums[kGate] + d;
      store_part(sum, fma(dr, load_part(g.branch + d, part), load_part(sum, part)), part);
    }
  });
}

template <class A, class S>
using GradientRowKernel = void (*)(const GradientRow<A, S>&, int64_t dim);

template <class A, class S>
inline GradientRowKernel<A, S> choose_gradient_row(bool branch, bool affine, bool two) {
  const GradientRowKernel<A, S> kernels[] = {
      gradient_row<A, S, false, false, false>, gradient_row<A, S, false, false, true>,
      gradient_row<A, S, false, true, false>,  gradient_row<A, S, false, true, true>,
      gradient_row<A, S, true, false, false>,  gradient_row<A, S, true, false, true>,
      gradient_row<A, S, true, true, false>,   gradient_row<A, S, true, true, true>};
  return kernels[4 * branch + 2 * affine + two];
}

template <class A, class S>
inline void norm_modulate_gradient(const NormModulateProblem& p, const NormModulateGradient& out, const Chunks& chunks,
                                   A* partial, int64_t begin, int64_t end) {
  const int64_t dim = p.dim;
  const Workspace<A> work(dim);
  const auto kernel = choose_gradient_row<A, S>(p.branch.data, p.weight || p.bias, p.modulations == 2);
  WideRows<A> gates(p.gate, dim, work.row(kWideGate), nullptr);
  Modulation<A> modulations[2] = {{p, 0, work}, {p, 1, work}};
  RowSums<A, kSums> sums(out.sums, chunks, dim, partial);
  GradientRow<A, S> g;
  g.weight = p.weight ? static_cast<const A*>(p.weight) : work.row(kOnes);
  g.bias = p.bias ? static_cast<const A*>(p.bias) : work.row(kZeros);
  g.rms = p.rms;
  g.grad_residual = static_cast<const S*>(static_cast<const void*>(work.row(kZeros)));
  for (int i = 0; i < kSums; ++i) g.sums[i] = sums.place(i);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    sums.add_chunk(chunk, [&](int64_t b, int64_t l) {
      const int64_t row = b * p.length + l;
      g.x = read_row<S>(p.x, b, l, dim, work.row(kWideX));
      g.h = work.row(kNormalized);
      if (p.branch.data) {
        g.branch = read_row<S>(p.branch, b, l, dim, work.row(kWideBranch));
        gates.move_to(b, l);
        g.gate = gates.row();
        g.grad_branch = write_row<S>(out.grad_branch, row, dim, work.row(kNormalized));
      }
      for (int i = 0; i < p.modulations; ++i) {
        modulations[i].move_to(b, l);
        g.factor[i] = modulations[i].factor();
        g.grad_y[i] = read_row<S>(out.grad_y[i], b, l, dim, work.row(kWideGrad + i));
      }
      if (out.grad_residual.data) {
        g.grad_residual = read_row<S>(out.grad_residual, b, l, dim, work.row(kWideGradResidual));
      }
      g.mean = p.rms ? A(0) : static_cast<const A*>(out.mean)[row];
      g.rstd = static_cast<const A*>(out.rstd)[row];
      g.grad_x = write_row<S>(out.grad_x, row, dim, work.row(kGradNormalized));
      g.dh = work.row(kGradNormalized);
      if constexpr (sizeof(S) == sizeof(A)) {
        // The rows of the results hold what is needed in between: the cache has no room for more rows.
        g.dh = g.grad_x;
        if (p.branch.data) g.h = g.grad_branch;
      }
      kernel(g, dim);
      finish_row(out.grad_x, row, dim, g.grad_x);
      if (p.branch.data) finish_row(out.grad_branch, row, dim, g.grad_branch);
    });
  }
}

// The type of all tensors that are read or written row by row, or float32 where they differ.
inline DType common_type(DType first, std::initializer_list<RowsView> views, std::initializer_list<RowsOut> outs) {
  bool same = true;
  for (const RowsView& view : views) same = same && (!view.data || view.dtype == first);
  for (const RowsOut& out : outs) same = same && (!out.data || out.dtype == first);
  return same ? first : DType::float32;
}

inline void forward(const NormModulateProblem& p, const NormModulateResult& out, int64_t begin, int64_t end) {
  if (p.wide) return norm_modulate_rows<double, double>(p, out, begin, end);
  switch (common_type(p.x.dtype, {p.branch}, {out.residual, out.y[0], out.y[1]})) {
    case DType::bfloat16:
      return norm_modulate_rows<float, BFloat16>(p, out, begin, end);
    case DType::float16:
      return norm_modulate_rows<float, Half>(p, out, begin, end);
    default:
      return norm_modulate_rows<float, float>(p, out, begin, end);
  }
}

inline void backward(const NormModulateProblem& p, const NormModulateGradient& out, const Chunks& chunks, void* partial,
                     int64_t begin, int64_t end) {
  if (p.wide) {
    return norm_modulate_gradient<double, double>(p, out, chunks, static_cast<double*>(partial), begin, end);
  }
  float* sums = static_cast<float*>(partial);
  switch (common_type(p.x.dtype, {p.branch, out.grad_residual, out.grad_y[0], out.grad_y[1]},
                      {out.grad_x, out.grad_branch})) {
    case DType::bfloat16:
      return norm_modulate_gradient<float, BFloat16>(p, out, chunks, sums, begin, end);
    case DType::float16:
      return norm_modulate_gradient<float, Half>(p, out, chunks, sums, begin, end);
    default:
      return norm_modulate_gradient<float, float>(p, out, chunks, sums, begin, end);
  }
}

inline void reduce(const NormModulateProblem& p, const NormModulateGradient& out, const Chunks& chunks,
                   const void* partial, int64_t begin, int64_t end) {
  for (int i = 0; i < kSums; ++i) {
    if (p.wide) {
      reduce_sum(out.sums[i], i, kSums, chunks, p.dim, static_cast<const double*>(partial), begin, end);
    } else {
      reduce_sum(out.sums[i], i, kSums, chunks, p.dim, static_cast<const float*>(partial), begin, end);
    }
  }
}

}  // namespace
}  // namespace vqkernels::cpu
