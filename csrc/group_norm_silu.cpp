#include "cpu/group_norm_silu.h"

#include <tuple>
#include <utility>

#include "binding.h"

namespace vqkernels {
namespace {

// Whether [B, C, ...] has no gaps and the channels innermost.
bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t i = 0; i < t.dim(); ++i) {
    const int64_t axis = i == 0 ? 1 : i == t.dim() - 1 ? 0 : t.dim() - i;
    if (t.size(axis) != 1 && t.stride(axis) != expected) return false;
    expected *= t.size(axis);
  }
  return true;
}

// A fresh tensor like x: channels-last where x has that order of strides, else contiguous.
Tensor dense_like(const Tensor& x) {
  const Tensor y = torch::stable::empty_like(x);
  if (y.is_contiguous() || is_channels_last(y)) return y;
  return torch::stable::new_empty(x, x.sizes(), x.scalar_type());
}

// t with the strides of `like`.
Tensor arranged(const Tensor& t, const Tensor& like) {
  bool equal = true;
  for (int64_t i = 0; i < t.dim(); ++i) equal = equal && (t.size(i) == 1 || t.stride(i) == like.stride(i));
  if (equal) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

std::optional<Tensor> of_channels(const std::optional<Tensor>& t, const char* name, const Tensor& x) {
  if (!t) return std::nullopt;
  check_shape(*t, name, {x.size(1)});
  check_same_device(*t, name, x);
  dtype_of(*t, name);
  if (t->scalar_type() == accumulation_type(x) && t->is_contiguous()) return t;
  return torch::stable::contiguous(torch::stable::to(*t, accumulation_type(x)));
}

struct Inputs {
  Tensor x;
  std::optional<Tensor> weight;
  std::optional<Tensor> bias;
  cpu::GroupNormSiluProblem problem;
};

// `like`: a dense tensor like x.
Inputs inputs_of(const Tensor& x, const Tensor& like, int64_t groups, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, double eps, const std::string& activation) {
  STD_TORCH_CHECK(groups > 0 && x.size(1) > 0 && x.size(1) % groups == 0,
                  "vqkernels: expected num_groups to divide the channels of x");
  STD_TORCH_CHECK(activation == "silu" || activation == "none", "vqkernels: unknown activation ", activation);
  Inputs in = {arranged(x, like), of_channels(weight, "weight", x), of_channels(bias, "bias", x), {}};
  int64_t positions = 1;
  for (int64_t i = 2; i < x.dim(); ++i) positions *= x.size(i);
  in.problem = {in.x.const_data_ptr(),
                in.weight ? in.weight->const_data_ptr() : nullptr,
                in.bias ? in.bias->const_data_ptr() : nullptr,
                dtype_of(x, "x"),
                positions == 1 || !like.is_contiguous(),
                activation == "silu",
                x.size(0),
                x.size(1),
                positions,
                groups,
                eps};
  return in;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cpu(const Tensor& x, int64_t groups,
                                                       const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& bias, double eps,
                                                       const std::string& activation) {
  const cpu::KeepSubnormals mode;
  STD_TORCH_CHECK(x.dim() >= 2, "vqkernels: expected x [B, C, ...]");
  Tensor y = dense_like(x);
  const Inputs in = inputs_of(x, y, groups, weight, bias, eps, activation);
  Tensor mean = empty(x, {x.size(0), groups}, accumulation_type(x)), rstd = torch::stable::empty_like(mean);
  if (x.numel() == 0) {
    torch::stable::zero_(mean);
    torch::stable::zero_(rstd);
    return {y, mean, rstd};
  }
  cpu::group_norm_silu(in.problem, y.mutable_data_ptr(), mean.mutable_data_ptr(), rstd.mutable_data_ptr(),
                       torch_threads());
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward_cpu(const Tensor& grad, const Tensor& x,
                                                                const std::optional<Tensor>& weight,
                                                                const std::optional<Tensor>& bias, const Tensor& mean,
                                                                const Tensor& rstd, const std::string& activation) {
  const cpu::KeepSubnormals mode;
  STD_TORCH_CHECK(x.dim() >= 2 && mean.dim() == 2, "vqkernels: expected x [B, C, ...] and mean [B, G]");
  const int64_t groups = mean.size(1);
  for (const auto& [name, t] : {std::pair{"mean", &mean}, {"rstd", &rstd}}) {
    check_shape(*t, name, {x.size(0), groups});
    check_type(*t, name, accumulation_type(x));
    check_same_device(*t, name, x);
  }
  STD_TORCH_CHECK(grad.sizes() == x.sizes(), "vqkernels: grad has an unexpected shape");
  check_type(grad, "grad", x.scalar_type());
  check_same_device(grad, "grad", x);
  Tensor grad_x = dense_like(x);
  const Inputs in = inputs_of(x, grad_x, groups, weight, bias, 0, activation);
  const Tensor dense_grad = arranged(grad, grad_x);
  const Tensor dense_mean = torch::stable::contiguous(mean), dense_rstd = torch::stable::contiguous(rstd);
  Tensor grad_weight = empty(x, {x.size(1)}, accumulation_type(x)), grad_bias = torch::stable::empty_like(grad_weight);
  if (x.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias};
  }
  cpu::group_norm_silu_backward(in.problem, dense_grad.const_data_ptr(), dense_mean.const_data_ptr(),
                                dense_rstd.const_data_ptr(), grad_x.mutable_data_ptr(), grad_weight.mutable_data_ptr(),
                                grad_bias.mutable_data_ptr(), torch_threads());
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&vqkernels::group_norm_silu_cpu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&vqkernels::group_norm_silu_backward_cpu));
}
