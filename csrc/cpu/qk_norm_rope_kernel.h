// Normalisation and rotation of heads (formulas: qk_norm_rope.h), written once on lanes.
#pragma once

#include <cmath>

#include "buffer.h"
#include "lanes.h"
#include "qk_norm_rope.h"

namespace vqkernels::cpu {
namespace {

// How lanes meet the columns of a row. What is loaded may reach into columns that have been visited or lie outside:
// `only_new` makes 0 of these, for sums.
template <class A>
struct WholeLanes {
  template <class T>
  VQKERNELS_LANES_INLINE Lanes<A> get(const T* p) const {
    return load(p);
  }
  template <class T>
  VQKERNELS_LANES_INLINE void put(T* p, const Lanes<A>& x) const {
    store(p, x);
  }
  VQKERNELS_LANES_INLINE Lanes<A> only_new(const Lanes<A>& x) const { return x; }
};

// Whether the number of each lane is at least `first`.
template <class A>
VQKERNELS_LANES_INLINE IntegerLanes<A> lanes_from(int64_t first) {
  A numbers[Lanes<A>::count];
  for (int64_t i = 0; i < Lanes<A>::count; ++i) numbers[i] = static_cast<A>(i);
  return load(numbers) >= broadcast(static_cast<A>(first));
}

template <class A>
struct OverlappingLanes : WholeLanes<A> {
  explicit OverlappingLanes(int64_t count) : inside_(lanes_from<A>(Lanes<A>::count - count)) {}
  VQKERNELS_LANES_INLINE Lanes<A> only_new(const Lanes<A>& x) const { return select<A>(inside_, x, broadcast(A(0))); }

 private:
  IntegerLanes<A> inside_;
};

template <class A>
struct FirstLanes {
  explicit FirstLanes(int64_t count) : count_(count), outside_(lanes_from<A>(count)) {}
  template <class T>
  VQKERNELS_LANES_INLINE Lanes<A> get(const T* p) const {
    return load(p, count_);
  }
  template <class T>
  VQKERNELS_LANES_INLINE void put(T* p, const Lanes<A>& x) const {
    store(p, x, count_);
  }
  VQKERNELS_LANES_INLINE Lanes<A> only_new(const Lanes<A>& x) const { return select<A>(outside_, broadcast(A(0)), x); }

 private:
  int64_t count_;
  IntegerLanes<A> outside_;
};

// Calls visit(column, access) until the columns [begin, end) are covered: the last lanes reach back, at most to column
// `first`, where there are enough columns. begin and end of one parity keep pairs in neighbouring lanes.
template <class A, class Visit>
VQKERNELS_LANES_INLINE void for_columns(int64_t first, int64_t begin, int64_t end, const Visit& visit) {
  constexpr int64_t kCount = Lanes<A>::count;
  int64_t d = begin;
  for (; d + kCount <= end; d += kCount) visit(d, WholeLanes<A>{});
  if (d == end) return;
  if (end - first >= kCount) {
    visit(end - kCount, OverlappingLanes<A>(end - d));
  } else {
    visit(d, FirstLanes<A>(end - d));
  }
}

// Exchanges lanes 2 i and 2 i + 1.
template <class A>
VQKERNELS_LANES_INLINE Lanes<A> swap_neighbours(const Lanes<A>& x) {
  return each_part<A>([&](int i) {
#if defined(__clang__)
    constexpr int kSize = kVectorBytes / sizeof(A);
    if constexpr (kSize == 2) {
      return __builtin_shufflevector(x.part[i], x.part[i], 1, 0);
    } else if constexpr (kSize == 4) {
      return __builtin_shufflevector(x.part[i], x.part[i], 1, 0, 3, 2);
    } else if constexpr (kSize == 8) {
      return __builtin_shufflevector(x.part[i], x.part[i], 1, 0, 3, 2, 5, 4, 7, 6);
    } else {
      return __builtin_shufflevector(x.part[i], x.part[i], 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    }
#else
    typename IntegerLanes<A>::Vector order;
    for (size_t lane = 0; lane < kVectorBytes / sizeof(A); ++lane) order[lane] = lane ^ 1;
    return __builtin_shuffle(x.part[i], order);
#endif
  });
}

// Sum over the columns of term(lanes, accumulator): four accumulators, added pairwise.
template <class A>
struct ColumnSum {
  Lanes<A> part[4] = {broadcast(A(0)), broadcast(A(0)), broadcast(A(0)), broadcast(A(0))};

  template <class T, class Term>
  VQKERNELS_LANES_INLINE void add(const T* x, int64_t dim, const Term& term) {
    constexpr int64_t kCount = Lanes<A>::count;
    int64_t d = 0;
    for (; d + 4 * kCount <= dim; d += 4 * kCount) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) part[i] = term(load(x + d + i * kCount), part[i]);
    }
    for_columns<A>(0, d, dim, [&](int64_t column, const auto& access) {
      part[0] = part[0] + access.only_new(term(access.get(x + column), broadcast(A(0))));
    });
  }
  VQKERNELS_LANES_INLINE A total() const { return sum((part[0] + part[1]) + (part[2] + part[3])); }
};

template <class A>
struct Statistics {
  A mean = 0;
  A scale = 1;       // r, or what to divide by instead
  double along = 0;  // what sum(h n) counts for in the gradient
  bool centred = false;
  bool divides = false;  // l2: the quotient keeps a norm of 1 where the product with a rounded reciprocal would not
};

template <class A>
VQKERNELS_LANES_INLINE Lanes<A> scaled(const Lanes<A>& x, const Lanes<A>& scale, bool divides) {
  return divides ? x / scale : x * scale;
}

// Of the `count` heads that x points to the first of.
template <class T, class A>
VQKERNELS_LANES_INLINE Statistics<A> statistics(const QkNormRopeProblem& p, const T* x, int64_t count) {
  Statistics<A> s;
  if (p.norm == HeadNorm::none) return s;
  const double size = static_cast<double>(count * p.dim);
  if (p.norm == HeadNorm::layer) {
    ColumnSum<A> total;
    for (int64_t h = 0; h < count; ++h) {
      total.add(x + h * p.x_strides.head, p.dim, [](const Lanes<A>& v, const Lanes<A>& sum) { return sum + v; });
    }
    s.mean = static_cast<A>(total.total() / size);
    s.centred = true;
  }
  const Lanes<A> mean = broadcast(s.mean);
  ColumnSum<A> squares;
  for (int64_t h = 0; h < count; ++h) {
    squares.add(x + h * p.x_strides.head, p.dim, [&](const Lanes<A>& v, const Lanes<A>& sum) {
      const Lanes<A> centred = v - mean;
      return fma(centred, centred, sum);
    });
  }
  // In double, so that the factor is rounded once.
  const double square = squares.total();
  if (p.norm == HeadNorm::l2) {
    const double norm = std::sqrt(square);
    s.scale = static_cast<A>(norm < p.eps ? p.eps : norm);  // NaN stays
    s.divides = true;
    s.along = norm < p.eps ? 0 : 1;
  } else {
    s.scale = static_cast<A>(1 / std::sqrt(square / size + p.eps));
    s.along = 1 / size;
  }
  return s;
}

// The tables of one position as the lanes take them.
template <class A>
class Rotation {
 public:
  explicit Rotation(const QkNormRopeProblem& p) : p_(p), doubled_(p.interleaved ? 4 * p.pairs : 0) {}

  void move_to(int64_t batch, int64_t position) {
    if (p_.pairs == 0) return;
    const int64_t place = batch * p_.table_batch_stride + position * p_.table_position_stride;
    cos_ = static_cast<const A*>(p_.cos) + place;
    sin_ = static_cast<const A*>(p_.sin) + place;
    if (!p_.interleaved) return;
    A* cos = doubled_.get();
    A* sin = cos + 2 * p_.pairs;
    for (int64_t i = 0; i < p_.pairs; ++i) {
      cos[2 * i] = cos[2 * i + 1] = cos_[i];
      sin[2 * i] = -sin_[i];
      sin[2 * i + 1] = sin_[i];
    }
    cos_ = cos;
    sin_ = sin;
  }

  // Takes get(column, access) of every column, rotated (Back: rotated back), to put(column, access, lanes).
  template <bool Back, class Get, class Put>
  VQKERNELS_LANES_INLINE void turn(const Get& get, const Put& put) const {
    const int64_t half = p_.pairs;
    if (p_.interleaved) {
      for_columns<A>(0, 0, 2 * half, [&](int64_t d, const auto& access) {
        const Lanes<A> x = get(d, access);
        const Lanes<A> along = x * access.get(cos_ + d), across = swap_neighbours(x) * access.get(sin_ + d);
        put(d, access, Back ? along - across : along + across);
      });
    } else {
      for_columns<A>(0, 0, half, [&](int64_t d, const auto& access) {
        const Lanes<A> x = get(d, access), y = get(d + half, access);
        const Lanes<A> cos = access.get(cos_ + d), sin = access.get(sin_ + d);
        put(d, access, Back ? x * cos + y * sin : x * cos - y * sin);
        put(d + half, access, Back ? y * cos - x * sin : y * cos + x * sin);
      });
    }
    for_columns<A>(2 * half, 2 * half, p_.dim, [&](int64_t d, const auto& access) { put(d, access, get(d, access)); });
  }

 private:
  const QkNormRopeProblem& p_;
  Buffer<A> doubled_;
  const A* cos_ = nullptr;
  const A* sin_ = nullptr;
};

template <class A>
VQKERNELS_LANES_INLINE const A* head_parameter(const HeadParameter& parameter, int64_t head, int64_t dim) {
  return static_cast<const A*>(parameter.data) + (parameter.heads > 1 ? head * dim : 0);
}

// Torch: rounded to T wherever torch's expression rounds.
template <class T, class A, bool Torch>
VQKERNELS_LANES_INLINE void forward_head(const QkNormRopeProblem& p, const Rotation<A>& rotation,
                                         const Statistics<A>& s, const T* x, int64_t head, T* out) {
  const A* weight = p.weight.heads ? head_parameter<A>(p.weight, head, p.dim) : nullptr;
  const A* bias = p.bias.heads ? head_parameter<A>(p.bias, head, p.dim) : nullptr;
  const Lanes<A> mean = broadcast(s.mean), scale = broadcast(s.scale);
  const auto rounded = [](const Lanes<A>& v) { return Torch ? rounded_to<T>(v) : v; };
  rotation.template turn<false>(
      [&](int64_t d, const auto& access) {
        Lanes<A> n = rounded(scaled(access.get(x + d) - mean, scale, s.divides));
        if (weight) n = rounded(n * access.get(weight + d));
        if (bias) n = n + access.get(bias + d);
        return n;
      },
      [&](int64_t d, const auto& access, const Lanes<A>& y) { access.put(out + d, y); });
}

template <class T, bool Torch>
void forward_rows_of(const QkNormRopeProblem& p, void* out, const HeadStrides& out_strides, int64_t row_begin,
                     int64_t row_end) {
  using A = decltype(widen(T{}));
  const int64_t group = p.across_heads ? p.heads : 1;
  Rotation<A> rotation(p);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t batch = row / p.length, position = row % p.length;
    rotation.move_to(batch, position);
    const T* x = static_cast<const T*>(p.x) + batch * p.x_strides.batch + position * p.x_strides.position;
    T* y = static_cast<T*>(out) + batch * out_strides.batch + position * out_strides.position;
    for (int64_t first = 0; first < p.heads; first += group) {
      Statistics<A> s;
      if constexpr (Torch) {
        s.scale = static_cast<const A*>(p.factor)[(row * p.heads + first) / group];
        s.divides = p.norm == HeadNorm::l2;
      } else {
        s = statistics<T, A>(p, x + first * p.x_strides.head, group);
      }
      for (int64_t head = first; head < first + group; ++head) {
        forward_head<T, A, Torch>(p, rotation, s, x + head * p.x_strides.head, head, y + head * out_strides.head);
      }
    }
  }
}

// Sums over positions of numbers [heads or 1, dim]: runs of about 16 terms in A, then in double.
template <class A>
class PositionSum {
 public:
  PositionSum(const HeadParameter& parameter, const QkNormRopeProblem& p, double* total)
      : dim_(p.dim),
        size_(parameter.heads * p.dim),
        per_head_(parameter.heads > 1),
        run_rows_(std::max<int64_t>(1, 16 / (per_head_ ? 1 : p.heads))),
        run_(size_),
        total_(total) {
    std::fill(run_.get(), run_.get() + size_, A(0));
    std::fill(total_, total_ + size_, 0.0);
  }
  A* of_head(int64_t head) const { return run_.get() + (per_head_ ? head * dim_ : 0); }
  void end_row() {
    if (++rows_ == run_rows_) end_run();
  }
  void end_run() {
    for (int64_t i = 0; i < size_; ++i) {
      total_[i] += run_[i];
      run_[i] = 0;
    }
    rows_ = 0;
  }

 private:
  int64_t dim_, size_;
  bool per_head_;
  int64_t run_rows_, rows_ = 0;
  Buffer<A> run_;
  double* total_;
};

// h and the sums of one head, of which n = (x - mean) r; returns through `sums` sum(h) and sum(h n) as lanes.
template <class T, class A, bool Weight, bool Bias>
VQKERNELS_LANES_INLINE void backward_head(const QkNormRopeProblem& p, const Rotation<A>& rotation,
                                          const Statistics<A>& s, const T* x, const T* grad, int64_t head,
                                          A* weight_run, A* bias_run, A* h, Lanes<A>* sums) {
  const A* weight = Weight ? head_parameter<A>(p.weight, head, p.dim) : nullptr;
  const Lanes<A> mean = broadcast(s.mean), scale = broadcast(s.scale);
  rotation.template turn<true>([&](int64_t d, const auto& access) { return access.get(grad + d); },
                               [&](int64_t d, const auto& access, const Lanes<A>& turned) {
                                 const Lanes<A> n = scaled(access.get(x + d) - mean, scale, s.divides);
                                 Lanes<A> g = turned;
                                 if constexpr (Bias) {
                                   access.put(bias_run + d, access.get(bias_run + d) + access.only_new(g));
                                 }
                                 if constexpr (Weight) {
                                   access.put(weight_run + d, access.get(weight_run + d) + access.only_new(g * n));
                                   g = g * access.get(weight + d);
                                 }
                                 access.put(h + d, g);
                                 sums[0] = sums[0] + access.only_new(g);
                                 sums[1] = sums[1] + access.only_new(g * n);
                               });
}

template <class T, bool Weight, bool Bias>
void backward_chunks_of(const QkNormRopeProblem& p, const QkNormRopeGradients& g, int64_t chunk_begin,
                        int64_t chunk_end) {
  using A = decltype(widen(T{}));
  const int64_t group = p.across_heads ? p.heads : 1;
  Rotation<A> rotation(p);
  Buffer<A> h(group * p.dim);
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    PositionSum<A> weight_sum(p.weight, p, g.weight_sums + chunk * p.weight.heads * p.dim);
    PositionSum<A> bias_sum(p.bias, p, g.bias_sums + chunk * p.bias.heads * p.dim);
    const int64_t row_end = std::min(p.rows(), (chunk + 1) * p.chunk_rows());
    for (int64_t row = chunk * p.chunk_rows(); row < row_end; ++row) {
      const int64_t batch = row / p.length, position = row % p.length;
      rotation.move_to(batch, position);
      const auto at = [&](auto* data, const HeadStrides& strides, int64_t head) {
        return data + batch * strides.batch + position * strides.position + head * strides.head;
      };
      for (int64_t first = 0; first < p.heads; first += group) {
        const Statistics<A> s = statistics<T, A>(p, at(static_cast<const T*>(p.x), p.x_strides, first), group);
        Lanes<A> sums[2] = {broadcast(A(0)), broadcast(A(0))};
        for (int64_t head = first; head < first + group; ++head) {
          backward_head<T, A, Weight, Bias>(p, rotation, s, at(static_cast<const T*>(p.x), p.x_strides, head),
                                            at(static_cast<const T*>(g.grad), g.grad_strides, head), head,
                                            weight_sum.of_head(head), bias_sum.of_head(head),
                                            h.get() + (head - first) * p.dim, sums);
        }
        const Lanes<A> mean = broadcast(s.mean), scale = broadcast(s.scale);
        const Lanes<A> level = broadcast(static_cast<A>(s.centred ? sum(sums[0]) * s.along : 0));
        const Lanes<A> along = broadcast(static_cast<A>(sum(sums[1]) * s.along));
        for (int64_t head = first; head < first + group; ++head) {
          const T* x = at(static_cast<const T*>(p.x), p.x_strides, head);
          T* grad_x = at(static_cast<T*>(g.grad_x), g.grad_x_strides, head);
          const A* from = h.get() + (head - first) * p.dim;
          for_columns<A>(0, 0, p.dim, [&](int64_t d, const auto& access) {
            Lanes<A> out = access.get(from + d);
            if (p.norm != HeadNorm::none) {
              const Lanes<A> n = scaled(access.get(x + d) - mean, scale, s.divides);
              out = scaled(fma(-n, along, out - level), scale, s.divides);
            }
            access.put(grad_x + d, out);
          });
        }
      }
      weight_sum.end_row();
      bias_sum.end_row();
    }
    weight_sum.end_run();
    bias_sum.end_run();
  }
}

template <class Run>
inline void with_type(DType type, const Run& run) {
  switch (type) {
    case DType::float64:
      return run(double{});
    case DType::bfloat16:
      return run(BFloat16{});
    case DType::float16:
      return run(Half{});
    default:
      return run(float{});
  }
}

inline void forward_rows(const QkNormRopeProblem& p, void* out, const HeadStrides& out_strides, int64_t row_begin,
                         int64_t row_end) {
  with_type(p.type, [&](auto type) {
    using T = decltype(type);
    if (p.factor) {
      forward_rows_of<T, true>(p, out, out_strides, row_begin, row_end);
    } else {
      forward_rows_of<T, false>(p, out, out_strides, row_begin, row_end);
    }
  });
}

inline void backward_chunks(const QkNormRopeProblem& p, const QkNormRopeGradients& g, int64_t chunk_begin,
                            int64_t chunk_end) {
  with_type(p.type, [&](auto type) {
    using T = decltype(type);
    if (p.bias.heads) {
      if (p.weight.heads) {
        backward_chunks_of<T, true, true>(p, g, chunk_begin, chunk_end);
      } else {
        backward_chunks_of<T, false, true>(p, g, chunk_begin, chunk_end);
      }
    } else if (p.weight.heads) {
      backward_chunks_of<T, true, false>(p, g, chunk_begin, chunk_end);
    } else {
      backward_chunks_of<T, false, false>(p, g, chunk_begin, chunk_end);
    }
  });
}

}  // namespace
}  // namespace vqkernels::cpu
