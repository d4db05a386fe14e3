#include "norm_modulate.h"

namespace vqkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_norm_modulate_cpu(
    const Tensor& x, const Tensor& branch, OptionalTensor gate, OptionalTensor shift, OptionalTensor scale,
    OptionalTensor shift2, OptionalTensor scale2, OptionalTensor weight, OptionalTensor bias, std::string norm,
    double eps, bool two) {
  NormArguments in{x, branch, gate, {shift, shift2}, {scale, scale2}, weight, bias, norm, eps, two};
  NormOutputs out = norm_modulate_forward(in);
  return {out.residual, out.y, out.y2, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
gate_residual_norm_modulate_backward_cpu(OptionalTensor grad_residual, const Tensor& grad_y, OptionalTensor grad_y2,
                                         const Tensor& x, OptionalTensor branch, OptionalTensor gate,
                                         OptionalTensor scale, OptionalTensor scale2, OptionalTensor weight,
                                         OptionalTensor bias, const Tensor& mean, const Tensor& rstd, std::string norm,
                                         std::vector<int64_t> layouts, bool affine) {
  STD_TORCH_CHECK(layouts.size() == 5, "vqkernels: expected five layouts");
  NormArguments in{x, branch, gate, {}, {scale, scale2}, weight, bias, norm, 0, grad_y2.has_value()};
  NormGradients out = norm_modulate_backward(in, grad_residual, grad_y, grad_y2, mean, rstd, layouts, affine);
  auto& sums = out.sums;
  return {out.grad_x, out.grad_branch, sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6]};
}

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("gate_residual_norm_modulate", TORCH_BOX(&vqkernels::gate_residual_norm_modulate_cpu));
  m.impl("gate_residual_norm_modulate_backward", TORCH_BOX(&vqkernels::gate_residual_norm_modulate_backward_cpu));
}
