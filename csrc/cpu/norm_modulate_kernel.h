// The norm chain (formulas: norm_modulate.h), written once for all instruction sets.
#pragma once

#include <cmath>

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
  kOutBranch,
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

// What modulates the row at hand, kept while rows have it in common.
template <class A>
class Modulation {
 public:
  Modulation(const NormModulateProblem& p, int i, const Workspace<A>& work)
      : shift(work.row(kZeros)),
        factor(work.row(kOnes)),
        shift_(p.shift[i]),
        scale_(p.scale[i]),
        dim_(p.dim),
        i_(i),
        work_(work) {}

  void move_to(int64_t b, int64_t l) {
    if (shift_.data) shift = wide_row(shift_, b, l, dim_, work_.row(kWideShift + i_));
    if (scale_.data && (b != b_ || scale_.row_stride != 0)) {
      const A* scale = wide_row(scale_, b, l, dim_, work_.row(kWideScale + i_));
      A* out = work_.row(kFactor + i_);
      for_lanes<A>(dim_, [&](int64_t d, auto part) VQKERNELS_INLINED {
        store_part(out + d, broadcast(A(1)) + load_part(scale + d, part), part);
      });
      factor = out;
    }
    b_ = b;
  }

  const A* shift;
  const A* factor;

 private:
  const RowsView& shift_;
  const RowsView& scale_;
  const int64_t dim_;
  const int i_;
  const Workspace<A>& work_;
  int64_t b_ = -1;
};

template <class A, bool kAffine>
inline void modulate_row(const A* r, A mean, A rstd, const A* weight, const A* bias, const A* factor, const A* shift,
                         int64_t dim, A* y) {
  const Lanes<A> means = broadcast(mean), rstds = broadcast(rstd);
  for_lanes<A>(dim, [&](int64_t d, auto part) VQKERNELS_INLINED {
    Lanes<A> n = (load_part(r + d, part) - means) * rstds;
    if constexpr (kAffine) n = fma(n, load_part(weight + d, part), load_part(bias + d, part));
    store_part(y + d, fma(n, load_part(factor + d, part), load_part(shift + d, part)), part);
    fetch(r + dim + d);
    fetch(y + dim + d);
  });
}

template <class A>
inline void norm_modulate_rows(const NormModulateProblem& p, const NormModulateResult& out, int64_t begin,
                               int64_t end) {
  const int64_t dim = p.dim;
  const Workspace<A> work(dim);
  const A* weight = p.weight ? static_cast<const A*>(p.weight) : work.row(kOnes);
  const A* bias = p.bias ? static_cast<const A*>(p.bias) : work.row(kZeros);
  const bool affine = p.weight || p.bias;
  const A count = static_cast<A>(dim);
  const A* gate = work.row(kOnes);
  Modulation<A> modulations[2] = {{p, 0, work}, {p, 1, work}};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.length, l = row % p.length;
    const A* x = wide_row(p.x, b, l, dim, work.row(kWideX));
    const A* r = x;
    A mean = 0, squares;
    if (p.branch.data) {
      const A* branch = wide_row(p.branch, b, l, dim, work.row(kWideBranch));
      if (p.gate.data) gate = wide_row(p.gate, b, l, dim, work.row(kWideGate));
      A* residual = begin_row(out.residual, row, dim, work.row(kResidual));
      mean = sum_lanes<A, 1>(dim,
                             [&](int64_t d, auto part, Lanes<A>* sum) VQKERNELS_INLINED {
                               const Lanes<A> value =
                                   fma(load_part(gate + d, part), load_part(branch + d, part), load_part(x + d, part));
                               store_part(residual + d, value, part);
                               fetch(branch + dim + d);
                               fetch(residual + dim + d);
                               sum[0] = sum[0] + value;
                             })[0] /
             count;
      finish_row(out.residual, row, dim, residual);
      r = residual;
    } else if (!p.rms) {
      mean = sum_lanes<A, 1>(dim, [&](int64_t d, auto part, Lanes<A>* sum)
                                      VQKERNELS_INLINED { sum[0] = sum[0] + load_part(r + d, part); })[0] /
             count;
    }
    if (p.rms) {
      mean = 0;
      squares = sum_lanes<A, 1>(dim, [&](int64_t d, auto part, Lanes<A>* sum) VQKERNELS_INLINED {
        const Lanes<A> value = load_part(r + d, part);
        sum[0] = fma(value, value, sum[0]);
      })[0];
    } else {
      const Lanes<A> means = broadcast(mean);
      const auto sums = sum_lanes<A, 2>(dim, [&](int64_t d, auto part, Lanes<A>* sum) VQKERNELS_INLINED {
        const Lanes<A> difference = load_filled(r + d, mean, part) - means;
        sum[0] = sum[0] + difference;
        sum[1] = fma(difference, difference, sum[1]);
      });
      mean += sums[0] / count;
      squares = std::max(sums[1] - sums[0] * (sums[0] / count), A(0));
    }
    const A rstd = A(1) / std::sqrt(squares / count + static_cast<A>(p.eps));
    if (out.mean) static_cast<A*>(out.mean)[row] = mean;
    static_cast<A*>(out.rstd)[row] = rstd;
    for (int i = 0; i < p.modulations; ++i) {
      modulations[i].move_to(b, l);
      A* y = begin_row(out.y[i], row, dim, work.row(kOut));
      const auto modulate = affine ? modulate_row<A, true> : modulate_row<A, false>;
      modulate(r, mean, rstd, weight, bias, modulations[i].factor, modulations[i].shift, dim, y);
      finish_row(out.y[i], row, dim, y);
    }
  }
}

// The rows that the gradient of one row is made of, and where it goes.
template <class A>
struct GradientRow {
  const A* x;
  const A* branch;
  const A* gate;
  const A* grad_y[2];
  const A* factor[2];
  const A* weight;
  const A* bias;
  const A* grad_residual;
  A mean;
  A rstd;
  bool rms;
  A* grad_x;
  A* grad_branch;
  A* sums[kSums];
};

template <class A, bool kBranch, bool kAffine, bool kTwo>
inline void gradient_row(const GradientRow<A>& row, int64_t dim) {
  const GradientRow<A> g = row;  // stores do not make the compiler read its pointers again
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
    // The rows of the results hold what the second pass needs: the cache has no room for more rows.
    store_part(g.grad_x + d, dh, part);
    fetch_far(g.x + dim + d);
    fetch_far(g.grad_x + dim + d);
    if constexpr (kBranch) fetch_far(g.branch + dim + d);
    if constexpr (kBranch) store_part(g.grad_branch + d, h, part);
    of_dh = of_dh + dh;
    of_dh_h = fma(dh, h, of_dh_h);
  });
  const A count = static_cast<A>(dim);
  const Lanes<A> mean_dh = broadcast(g.rms ? A(0) : sum(of_dh) / count);
  const Lanes<A> mean_dh_h = broadcast(sum(of_dh_h) / count);
  for_lanes<A>(dim, [&](int64_t d, auto part) VQKERNELS_INLINED {
    Lanes<A> h;
    if constexpr (kBranch) {
      h = load_part(g.grad_branch + d, part);
    } else {
      h = (load_part(g.x + d, part) - means) * rstds;
    }
    const Lanes<A> centered = load_part(g.grad_x + d, part) - mean_dh - h * mean_dh_h;
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

template <class A>
using GradientRowKernel = void (*)(const GradientRow<A>&, int64_t dim);

template <class A>
inline GradientRowKernel<A> choose_gradient_row(bool branch, bool affine, bool two) {
  const GradientRowKernel<A> kernels[] = {gradient_row<A, false, false, false>, gradient_row<A, false, false, true>,
                                          gradient_row<A, false, true, false>,  gradient_row<A, false, true, true>,
                                          gradient_row<A, true, false, false>,  gradient_row<A, true, false, true>,
                                          gradient_row<A, true, true, false>,   gradient_row<A, true, true, true>};
  return kernels[4 * branch + 2 * affine + two];
}

template <class A>
inline void norm_modulate_gradient(const NormModulateProblem& p, const NormModulateGradient& out, const Chunks& chunks,
                                   A* partial, int64_t begin, int64_t end) {
  const int64_t dim = p.dim;
  const Workspace<A> work(dim);
  const bool two = p.modulations == 2;
  const GradientRowKernel<A> kernel = choose_gradient_row<A>(p.branch.data, p.weight || p.bias, two);
  Modulation<A> modulations[2] = {{p, 0, work}, {p, 1, work}};
  RowSums<A, kSums> sums(out.sums, chunks, dim, partial);
  GradientRow<A> g;
  g.weight = p.weight ? static_cast<const A*>(p.weight) : work.row(kOnes);
  g.bias = p.bias ? static_cast<const A*>(p.bias) : work.row(kZeros);
  g.rms = p.rms;
  g.grad_residual = work.row(kZeros);
  for (int i = 0; i < kSums; ++i) g.sums[i] = sums.place(i);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    sums.add_chunk(chunk, [&](int64_t b, int64_t l) {
      const int64_t row = b * p.length + l;
      g.x = wide_row(p.x, b, l, dim, work.row(kWideX));
      if (p.branch.data) {
        g.branch = wide_row(p.branch, b, l, dim, work.row(kWideBranch));
        g.gate = wide_row(p.gate, b, l, dim, work.row(kWideGate));
        g.grad_branch = begin_row(out.grad_branch, row, dim, work.row(kOutBranch));
      }
      for (int i = 0; i < p.modulations; ++i) {
        modulations[i].move_to(b, l);
        g.factor[i] = modulations[i].factor;
        g.grad_y[i] = wide_row(out.grad_y[i], b, l, dim, work.row(kWideGrad + i));
      }
      if (out.grad_residual.data) {
        g.grad_residual = wide_row(out.grad_residual, b, l, dim, work.row(kWideGradResidual));
      }
      g.mean = p.rms ? A(0) : static_cast<const A*>(out.mean)[row];
      g.rstd = static_cast<const A*>(out.rstd)[row];
      g.grad_x = begin_row(out.grad_x, row, dim, work.row(kOut));
      kernel(g, dim);
      finish_row(out.grad_x, row, dim, g.grad_x);
      if (p.branch.data) finish_row(out.grad_branch, row, dim, g.grad_branch);
    });
  }
}

inline void forward(const NormModulateProblem& p, const NormModulateResult& out, int64_t begin, int64_t end) {
  if (p.wide) return norm_modulate_rows<double>(p, out, begin, end);
  norm_modulate_rows<float>(p, out, begin, end);
}

inline void backward(const NormModulateProblem& p, const NormModulateGradient& out, const Chunks& chunks, void* partial,
                     int64_t begin, int64_t end) {
  if (p.wide) return norm_modulate_gradient(p, out, chunks, static_cast<double*>(partial), begin, end);
  norm_modulate_gradient(p, out, chunks, static_cast<float*>(partial), begin, end);
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
