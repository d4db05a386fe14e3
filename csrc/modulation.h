// What the bindings of the norm chain share: tensors [B, L, D] with any strides, and the gradients of modulations.
#pragma once

#include <algorithm>
#include <vector>

#include "binding.h"
#include "cpu/modulation.h"

namespace vqkernels {

using OptionalTensor = std::optional<Tensor>;

struct Sizes {
  int64_t batch;
  int64_t length;
  int64_t dim;
};

inline Sizes sizes_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, "vqkernels: expected x [B, L, D] with D at least 1");
  return {x.size(0), x.size(1), x.size(2)};
}

inline int64_t size_along(const Tensor& t, int64_t dim, int64_t size, bool broadcasts, const char* name) {
  STD_TORCH_CHECK(t.size(dim) == size || (broadcasts && t.size(dim) == 1), "vqkernels: ", name,
                  " has an unexpected shape");
  return t.size(dim) == 1 ? 0 : t.stride(dim);
}

// A view of t [B, L, D], or where it broadcasts one with 1 for B or L. The tensors of copies go to `kept`.
inline cpu::RowsView rows_view(const Tensor& t, const char* name, const Tensor& x, bool broadcasts,
                               std::vector<Tensor>& kept) {
  const Sizes sizes = sizes_of(x);
  STD_TORCH_CHECK(t.dim() == 3 && t.size(2) == sizes.dim, "vqkernels: ", name, " has an unexpected shape");
  check_same_device(t, name, x);
  const DType dtype = dtype_of(t, name);
  kept.push_back(t.stride(2) == 1 || sizes.dim == 1 ? t : torch::stable::contiguous(t));
  const Tensor& dense = kept.back();
  const int64_t batch_stride = size_along(dense, 0, sizes.batch, broadcasts, name);
  return {dense.const_data_ptr(), dtype, batch_stride, size_along(dense, 1, sizes.length, broadcasts, name)};
}

inline cpu::RowsView rows_view(const OptionalTensor& t, const char* name, const Tensor& x, bool broadcasts,
                               std::vector<Tensor>& kept) {
  return t ? rows_view(*t, name, x, broadcasts, kept) : cpu::RowsView{};
}

// Kernels read nothing wider than the arithmetic.
inline void check_width(std::initializer_list<const cpu::RowsView*> views, bool wide) {
  for (const cpu::RowsView* view : views) {
    STD_TORCH_CHECK(wide || !view->data || view->dtype != DType::float64,
                    "vqkernels: expected gradients in float64 where an argument is");
  }
}

// [D] in the arithmetic type.
inline const void* parameter(const OptionalTensor& t, const char* name, const Tensor& x, ScalarType type,
                             std::vector<Tensor>& kept) {
  if (!t) return nullptr;
  check_shape(*t, name, {x.size(2)});
  check_same_device(*t, name, x);
  dtype_of(*t, name);
  kept.push_back(torch::stable::contiguous(torch::stable::to(*t, type)));
  return kept.back().const_data_ptr();
}

inline ScalarType promoted(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline cpu::RowsOut rows_out(Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t, "output")}; }

// The gradient of a modulation of x, and its tensor; `layout` as in the schema.
inline cpu::GradientOut gradient_out(const Tensor& x, int64_t layout, ScalarType type, Tensor& out) {
  STD_TORCH_CHECK(layout >= 0 && layout <= 3, "vqkernels: unknown layout");
  const auto kind = static_cast<cpu::Layout>(layout);
  if (kind == cpu::Layout::none) {
    out = empty(x, {0}, type);
    return {};
  }
  const Sizes sizes = sizes_of(x);
  out = empty(
      x, {kind == cpu::Layout::of_all ? 1 : sizes.batch, kind == cpu::Layout::of_row ? sizes.length : 1, sizes.dim},
      type);
  return {out.mutable_data_ptr(), dtype_of(out, "gradient"), kind};
}

// Sums are shortest where batch items are long: items of one row become rows of one item, and so do items that have
// everything in common.
template <class Sums>
inline void merge_items(int64_t& batch, int64_t& length, std::initializer_list<cpu::RowsView*> views, Sums& sums) {
  if (length == 1) {
    for (cpu::RowsView* view : views) *view = {view->data, view->dtype, 0, view->batch_stride};
    for (auto& sum : sums) {
      if (sum.layout == cpu::Layout::of_batch) sum.layout = cpu::Layout::of_row;
    }
  } else {
    for (const cpu::RowsView* view : views) {
      if (view->data && view->batch_stride != length * view->row_stride) return;
    }
    for (const auto& sum : sums) {
      if (sum.layout == cpu::Layout::of_batch) return;
    }
  }
  length *= batch;
  batch = 1;
}

}  // namespace vqkernels
