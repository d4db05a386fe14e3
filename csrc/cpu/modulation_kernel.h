// Rows in the arithmetic type, and sums over rows in a fixed order (modulation.h).
#pragma once

#include <array>
#include <cstring>

#include "../float16.h"
#include "buffer.h"
#include "lanes.h"
#include "modulation.h"

#define VQKERNELS_INLINED __attribute__((always_inline))

namespace vqkernels::cpu {
namespace {

// Calls body(d, part) for all of [0, dim) in steps of the lanes; part tells load_part and store_part how many are left.
struct WholeLanes {};
struct SomeLanes {
  int64_t count;
};

template <class A, class Body>
VQKERNELS_LANES_INLINE void for_lanes(int64_t dim, const Body& body) {
  int64_t d = 0;
  for (; d + Lanes<A>::count <= dim; d += Lanes<A>::count) body(d, WholeLanes{});
  if (d < dim) body(d, SomeLanes{dim - d});
}

template <class T>
VQKERNELS_LANES_INLINE auto load_part(const T* p, WholeLanes) {
  return load(p);
}
template <class T>
VQKERNELS_LANES_INLINE auto load_part(const T* p, SomeLanes part) {
  return load(p, part.count);
}
// Lanes beyond the last number hold `fill`.
template <class T, class A>
VQKERNELS_LANES_INLINE Lanes<A> load_filled(const T* p, A, WholeLanes) {
  return load(p);
}
template <class T, class A>
VQKERNELS_LANES_INLINE Lanes<A> load_filled(const T* p, A fill, SomeLanes part) {
  A padded[Lanes<A>::count];
  for (int64_t i = 0; i < Lanes<A>::count; ++i) padded[i] = i < part.count ? static_cast<A>(widen(p[i])) : fill;
  return load(padded);
}
template <class T, class A>
VQKERNELS_LANES_INLINE void store_part(T* p, const Lanes<A>& x, WholeLanes) {
  store(p, x);
}
template <class T, class A>
VQKERNELS_LANES_INLINE void store_part(T* p, const Lanes<A>& x, SomeLanes part) {
  store(p, x, part.count);
}

// Starts loading what lies at p, to read or to write. Rows that follow are fetched while one is worked on: kernels are
// as fast as memory then. An address beyond the last row does no harm.
template <class T>
VQKERNELS_LANES_INLINE void fetch(const T* p) {
  __builtin_prefetch(p, 0, 3);
}
// Into the second-level cache, where the first has no room for another row of each tensor.
template <class T>
VQKERNELS_LANES_INLINE void fetch_far(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

template <class A>
inline constexpr DType kArithmeticType = sizeof(A) == 8 ? DType::float64 : DType::float32;

template <class T, class A>
inline void widen_row(const void* data, int64_t dim, A* out) {
  const T* row = static_cast<const T*>(data);
  if constexpr (sizeof(A) == 4) {
    for_lanes<A>(dim, [&](int64_t d, auto part) VQKERNELS_INLINED {
      store_part(out + d, load_part(row + d, part), part);
      fetch(row + dim + d);
    });
  } else {
    for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<A>(widen(row[d]));
  }
}

template <class T, class A>
inline void narrow_row(const A* row, int64_t dim, void* data) {
  T* out = static_cast<T*>(data);
  if constexpr (sizeof(A) == 4) {
    for_lanes<A>(dim,
                 [&](int64_t d, auto part) VQKERNELS_INLINED { store_part(out + d, load_part(row + d, part), part); });
  } else {
    for (int64_t d = 0; d < dim; ++d) narrow(static_cast<float>(row[d]), out + d);
  }
}

// Row l of item b in the arithmetic type: where it lies if it has this type, else a copy in `scratch`.
template <class A>
inline const A* wide_row(const RowsView& rows, int64_t b, int64_t l, int64_t dim, A* scratch) {
  const int64_t offset = (b * rows.batch_stride + l * rows.row_stride) * size_of(rows.dtype);
  const void* data = static_cast<const char*>(rows.data) + offset;
  if (rows.dtype == kArithmeticType<A>) return static_cast<const A*>(data);
  switch (rows.dtype) {
    case DType::bfloat16:
      widen_row<BFloat16>(data, dim, scratch);
      break;
    case DType::float16:
      widen_row<Half>(data, dim, scratch);
      break;
    default:
      widen_row<float>(data, dim, scratch);
  }
  return scratch;
}

// A tensor of few different rows, such as a modulation: a copy in the arithmetic type lasts until the next one.
template <class A>
class WideRows {
 public:
  WideRows(const RowsView& rows, int64_t dim, A* scratch, const A* absent)
      : row_(absent), rows_(rows), dim_(dim), scratch_(scratch) {}

  // Goes to row l of item b; whether it is another one.
  bool move_to(int64_t b, int64_t l) {
    if (!rows_.data || (b == b_ && rows_.row_stride == 0)) return false;
    row_ = wide_row(rows_, b, l, dim_, scratch_);
    b_ = b;
    return true;
  }
  const A* row() const { return row_; }

 private:
  const A* row_;
  const RowsView& rows_;
  const int64_t dim_;
  A* const scratch_;
  int64_t b_ = -1;
};

// Rows that are read or written once, in their own type S. It is the arithmetic type where tensors differ in type;
// their rows are widened and narrowed in `scratch` then.
template <class S, class A>
inline const S* read_row(const RowsView& rows, int64_t b, int64_t l, int64_t dim, A* scratch) {
  if constexpr (sizeof(S) == sizeof(A)) {
    return wide_row(rows, b, l, dim, scratch);
  } else {
    return static_cast<const S*>(rows.data) + b * rows.batch_stride + l * rows.row_stride;
  }
}

// Where a row of an output is made: in its place if it has the arithmetic type, else in `scratch`, for `finish_row`.
template <class A>
inline A* begin_row(const RowsOut& rows, int64_t row, int64_t dim, A* scratch) {
  return rows.dtype == kArithmeticType<A> ? static_cast<A*>(rows.data) + row * dim : scratch;
}

// The same for rows of the type S of `read_row`.
template <class S, class A>
inline S* write_row(const RowsOut& rows, int64_t row, int64_t dim, A* scratch) {
  if constexpr (sizeof(S) == sizeof(A)) {
    return begin_row(rows, row, dim, scratch);
  } else {
    return static_cast<S*>(rows.data) + row * dim;
  }
}

inline void finish_row(const RowsOut&, int64_t, int64_t, const BFloat16*) {}
inline void finish_row(const RowsOut&, int64_t, int64_t, const Half*) {}
template <class A>
inline void finish_row(const RowsOut& rows, int64_t row, int64_t dim, const A* values) {
  void* data = static_cast<char*>(rows.data) + row * dim * size_of(rows.dtype);
  if (rows.dtype == kArithmeticType<A>) {
    if (values != data) std::memcpy(data, values, dim * sizeof(A));
    return;
  }
  switch (rows.dtype) {
    case DType::bfloat16:
      return narrow_row<BFloat16>(values, dim, data);
    case DType::float16:
      return narrow_row<Half>(values, dim, data);
    default:
      return narrow_row<float>(values, dim, data);
  }
}

// Sums over rows, `count` of them side by side, made chunk by chunk. `place(i)` is where row values are added; for a
// gradient that is not wanted it is a place that nobody reads.
template <class A, int kCount>
class RowSums {
 public:
  // partial: rows [chunk][sum][dim], see `reduce_sums`.
  RowSums(const std::array<GradientOut, kCount>& out, const Chunks& chunks, int64_t dim, A* partial)
      : out_(out), chunks_(chunks), dim_(dim), partial_(partial), runs_(kCount * dim), totals_(kCount * dim) {
    std::memset(runs_.get(), 0, kCount * dim * sizeof(A));
  }

  A* place(int i) const { return runs_.get() + i * dim_; }

  // Calls row(b, l) for the rows of a chunk.
  template <class Row>
  void add_chunk(int64_t chunk, const Row& row) {
    const int64_t first = chunks_.chunks_of_item == 1 ? chunk * chunks_.items_of_chunk : chunk / chunks_.chunks_of_item;
    const int64_t last = std::min(first + chunks_.items_of_chunk, chunks_.batch);
    const int64_t begin = chunks_.chunks_of_item == 1 ? 0 : chunk % chunks_.chunks_of_item * chunks_.rows_of_chunk;
    const int64_t end = std::min(begin + chunks_.rows_of_chunk, chunks_.length);
    clear(Layout::of_all, totals_.get());
    for (int64_t b = first; b < last; ++b) {
      clear(Layout::of_batch, totals_.get());
      for (int64_t run = begin; run < end; run += kRunRows) {
        clear(Layout::of_batch, runs_.get());
        clear(Layout::of_all, runs_.get());
        for (int64_t l = run; l < std::min(run + kRunRows, end); ++l) {
          clear(Layout::of_row, runs_.get());
          row(b, l);
          write_rows(b * chunks_.length + l);
        }
        add_runs();
      }
      for (int i = 0; i < kCount; ++i) {
        if (out_[i].layout != Layout::of_batch) continue;
        if (chunks_.chunks_of_item == 1) {
          write(i, b);
        } else {
          keep(i, chunk);
        }
      }
    }
    for (int i = 0; i < kCount; ++i) {
      if (out_[i].layout == Layout::of_all) keep(i, chunk);
    }
  }

 private:
  template <class T>
  void clear(Layout layout, T* sums) const {
    for (int i = 0; i < kCount; ++i) {
      if (out_[i].layout == layout) std::memset(sums + i * dim_, 0, dim_ * sizeof(T));
    }
  }
  void write_rows(int64_t row) const {
    for (int i = 0; i < kCount; ++i) {
      if (out_[i].layout == Layout::of_row) finish_row<A>({out_[i].data, out_[i].dtype}, row, dim_, place(i));
    }
  }
  void add_runs() const {
    for (int i = 0; i < kCount; ++i) {
      if (out_[i].layout != Layout::of_batch && out_[i].layout != Layout::of_all) continue;
      const A* run = place(i);
      double* total = totals_.get() + i * dim_;
      for (int64_t d = 0; d < dim_; ++d) total[d] += run[d];
    }
  }
  void write(int i, int64_t row) const {
    A* values = place(i);
    for (int64_t d = 0; d < dim_; ++d) values[d] = static_cast<A>(totals_[i * dim_ + d]);
    finish_row<A>({out_[i].data, out_[i].dtype}, row, dim_, values);
  }
  void keep(int i, int64_t chunk) const {
    A* values = partial_ + (chunk * kCount + i) * dim_;
    for (int64_t d = 0; d < dim_; ++d) values[d] = static_cast<A>(totals_[i * dim_ + d]);
  }

  const std::array<GradientOut, kCount>& out_;
  const Chunks& chunks_;
  const int64_t dim_;
  A* const partial_;
  const Buffer<A> runs_;
  const Buffer<double> totals_;
};

// Adds up what the chunks have kept: columns [begin, end) of sum i.
template <class A>
inline void reduce_sum(const GradientOut& out, int i, int count, const Chunks& chunks, int64_t dim, const A* partial,
                       int64_t begin, int64_t end) {
  const bool of_all = out.layout == Layout::of_all;
  if (!of_all && (out.layout != Layout::of_batch || chunks.chunks_of_item == 1)) return;
  const int64_t items = of_all ? 1 : chunks.batch;
  const int64_t parts = of_all ? chunks.count : chunks.chunks_of_item;
  const Buffer<double> totals(end - begin);
  const Buffer<A> values(end - begin);
  for (int64_t item = 0; item < items; ++item) {
    std::memset(totals.get(), 0, (end - begin) * sizeof(double));
    for (int64_t part = item * parts; part < (item + 1) * parts; ++part) {
      const A* row = partial + (part * count + i) * dim;
      for (int64_t d = begin; d < end; ++d) totals[d - begin] += row[d];
    }
    for (int64_t d = begin; d < end; ++d) values[d - begin] = static_cast<A>(totals[d - begin]);
    char* data = static_cast<char*>(out.data) + (item * dim + begin) * size_of(out.dtype);
    finish_row<A>({data, out.dtype}, 0, end - begin, values.get());
  }
}

}  // namespace
}  // namespace vqkernels::cpu
