#include "cpu/qk_norm_rope.h"

#include <tuple>

#include "binding.h"

namespace vqkernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Rows of unit stride: a view with another one is copied.
Tensor with_dense_rows(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

cpu::HeadStrides head_strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

cpu::HeadNorm norm_of(const std::string& norm) {
  if (norm == "none") return cpu::HeadNorm::none;
  if (norm == "rms") return cpu::HeadNorm::rms;
  if (norm == "layer") return cpu::HeadNorm::layer;
  STD_TORCH_CHECK(norm == "l2", "vqkernels: unknown norm ", norm);
  return cpu::HeadNorm::l2;
}

// A problem with the tensors that its pointers lead into.
struct Inputs {
  Tensor x;
  OptionalTensor weight, bias, cos, sin, factor;
  cpu::QkNormRopeProblem problem;
};

OptionalTensor parameter(const OptionalTensor& t, const char* name, const Tensor& x) {
  if (!t) return std::nullopt;
  STD_TORCH_CHECK(t->dim() == 2 && (t->size(0) == 1 || t->size(0) == x.size(2)) && t->size(1) == x.size(3),
                  "vqkernels: ", name, " has an unexpected shape");
  check_type(*t, name, accumulation_type(x));
  check_same_device(*t, name, x);
  return torch::stable::contiguous(*t);
}

OptionalTensor table(const OptionalTensor& t, const char* name, const Tensor& x) {
  if (!t) return std::nullopt;
  STD_TORCH_CHECK(t->dim() == 3 && (t->size(0) == 1 || t->size(0) == x.size(0)) && t->size(1) == x.size(1) &&
                      2 * t->size(2) <= x.size(3),
                  "vqkernels: ", name, " has an unexpected shape");
  check_type(*t, name, accumulation_type(x));
  check_same_device(*t, name, x);
  return with_dense_rows(*t);
}

Inputs inputs_of(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& cos,
                 const OptionalTensor& sin, const OptionalTensor& factor, const std::string& norm, bool across_heads,
                 double eps, const std::string& layout) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(2) > 0 && x.size(3) > 0,
                  "vqkernels: expected x [B, L, H, D] with at least one head and dimension");
  STD_TORCH_CHECK(layout == "interleaved" || layout == "half", "vqkernels: unknown layout ", layout);
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "vqkernels: expected cos and sin, or neither");
  Inputs in{with_dense_rows(x),
            parameter(weight, "weight", x),
            parameter(bias, "bias", x),
            table(cos, "cos", x),
            table(sin, "sin", x),
            std::nullopt,
            {}};
  if (factor) {
    check_shape(*factor, "factor", {x.size(0), x.size(1), across_heads ? 1 : x.size(2), 1});
    check_type(*factor, "factor", accumulation_type(x));
    check_same_device(*factor, "factor", x);
    STD_TORCH_CHECK(norm == "rms" || norm == "l2", "vqkernels: expected no factor with norm ", norm);
    in.factor = torch::stable::contiguous(*factor);
  }
  cpu::QkNormRopeProblem& p = in.problem;
  if (in.cos) {
    check_shape(*in.sin, "sin", {in.cos->size(0), in.cos->size(1), in.cos->size(2)});
    // One pair of strides serves both tables.
    if (in.cos->stride(0) != in.sin->stride(0) || in.cos->stride(1) != in.sin->stride(1)) {
      in.cos = torch::stable::contiguous(*in.cos);
      in.sin = torch::stable::contiguous(*in.sin);
    }
    p.cos = in.cos->const_data_ptr();
    p.sin = in.sin->const_data_ptr();
    p.table_batch_stride = in.cos->size(0) == 1 ? 0 : in.cos->stride(0);
    p.table_position_stride = in.cos->stride(1);
    p.pairs = in.cos->size(2);
  }
  if (in.weight) p.weight = {in.weight->const_data_ptr(), in.weight->size(0)};
  if (in.bias) p.bias = {in.bias->const_data_ptr(), in.bias->size(0)};
  p.factor = in.factor ? in.factor->const_data_ptr() : nullptr;
  p.x = in.x.const_data_ptr();
  p.x_strides = head_strides(in.x);
  p.type = dtype_of(x, "x");
  p.norm = norm_of(norm);
  p.across_heads = across_heads;
  p.interleaved = layout == "interleaved";
  p.eps = eps;
  p.batch = x.size(0);
  p.length = x.size(1);
  p.heads = x.size(2);
  p.dim = x.size(3);
  return in;
}

// Like x, rows dense. Where the strides that torch chooses are others, the caller copies.
Tensor dense_like(const Tensor& x) {
  Tensor out = torch::stable::empty_like(x);
  return out.size(3) <= 1 || out.stride(3) == 1
             ? out
             : empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
}

Tensor ordered_like(const Tensor& x, const Tensor& out) {
  Tensor ordered = torch::stable::empty_like(x);
  if (ordered.size(3) <= 1 || ordered.stride(3) == 1) return out;
  return torch::stable::copy_(ordered, out);
}

Tensor qk_norm_rope_cpu(const Tensor& x, OptionalTensor weight, OptionalTensor bias, OptionalTensor cos,
                        OptionalTensor sin, OptionalTensor factor, std::string norm, bool across_heads, double eps,
                        std::string layout) {
  const cpu::KeepSubnormals mode;
  const Inputs in = inputs_of(x, weight, bias, cos, sin, factor, norm, across_heads, eps, layout);
  Tensor out = dense_like(x);
  cpu::qk_norm_rope(in.problem, out.mutable_data_ptr(), head_strides(out), torch_threads());
  return ordered_like(x, out);
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_backward_cpu(const Tensor& grad, const Tensor& x, OptionalTensor weight,
                                                             OptionalTensor bias, OptionalTensor cos,
                                                             OptionalTensor sin, std::string norm, bool across_heads,
                                                             double eps, std::string layout) {
  const cpu::KeepSubnormals mode;
  const Inputs in = inputs_of(x, weight, bias, cos, sin, std::nullopt, norm, across_heads, eps, layout);
  check_shape(grad, "grad", {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_type(grad, "grad", x.scalar_type());
  check_same_device(grad, "grad", x);
  const Tensor dense_grad = with_dense_rows(grad);
  Tensor grad_x = dense_like(x);
  const cpu::QkNormRopeProblem& p = in.problem;
  const auto sums = [&](const cpu::HeadParameter& of) {
    return empty(x, {p.chunks(), of.heads, p.dim}, ScalarType::Double);
  };
  const auto result = [&](const cpu::HeadParameter& of) {
    return empty(x, {of.heads, of.heads ? p.dim : 0}, accumulation_type(x));
  };
  Tensor weight_sums = sums(p.weight), bias_sums = sums(p.bias);
  Tensor grad_weight = result(p.weight), grad_bias = result(p.bias);
  const cpu::QkNormRopeGradients gradients{dense_grad.const_data_ptr(),
                                           head_strides(dense_grad),
                                           grad_x.mutable_data_ptr(),
                                           head_strides(grad_x),
                                           static_cast<double*>(weight_sums.mutable_data_ptr()),
                                           static_cast<double*>(bias_sums.mutable_data_ptr())};
  cpu::qk_norm_rope_backward(p, gradients, grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr(),
                             torch_threads());
  return {ordered_like(x, grad_x), grad_weight, grad_bias};
}

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&vqkernels::qk_norm_rope_cpu));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&vqkernels::qk_norm_rope_backward_cpu));
}
