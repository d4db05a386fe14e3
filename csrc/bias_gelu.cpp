#include "cpu/bias_gelu.h"

#include <string>
#include <tuple>
#include <vector>

#include "feed_forward.h"

namespace vqkernels {
namespace {

cpu::BiasGeluProblem bias_gelu_problem(const Tensor& x, const OptionalTensor& bias, const std::string& approximate,
                                       std::vector<Tensor>& kept) {
  const Sizes sizes = sizes_of(x);
  const bool wide = biased_type(x, bias) == ScalarType::Double;
  return {rows_view(x, "x", x, false, kept),
          parameter(bias, "bias", x, wide ? ScalarType::Double : ScalarType::Float, kept),
          gelu_of(approximate),
          sizes.batch,
          sizes.length,
          sizes.dim,
          wide};
}

Tensor bias_gelu_cpu(const Tensor& x, OptionalTensor bias, std::string approximate) {
  const cpu::KeepSubnormals mode;
  std::vector<Tensor> kept;
  const cpu::BiasGeluProblem p = bias_gelu_problem(x, bias, approximate, kept);
  Tensor y = empty(x, {p.batch, p.length, p.dim}, biased_type(x, bias));
  cpu::bias_gelu(p, rows_out(y), torch_threads());
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward_cpu(const Tensor& grad_y, const Tensor& x, OptionalTensor bias,
                                                  std::string approximate, bool bias_gradient) {
  const cpu::KeepSubnormals mode;
  std::vector<Tensor> kept;
  const cpu::BiasGeluProblem p = bias_gelu_problem(x, bias, approximate, kept);
  check_shape(grad_y, "grad_y", {p.batch, p.length, p.dim});
  check_same_device(grad_y, "grad_y", x);
  Tensor grad_x = empty(x, {p.batch, p.length, p.dim}, x.scalar_type());
  Tensor grad_bias = empty_bias_gradient(x, bias, bias_gradient);
  const cpu::BiasGeluGradient g{
      gradient_view(grad_y, p.wide, kept), rows_out(grad_x), {bias_sum(grad_bias, bias_gradient)}};
  cpu::bias_gelu_backward(p, g, torch_threads());
  return {grad_x, grad_bias};
}

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&vqkernels::bias_gelu_cpu));
  m.impl("bias_gelu_backward", TORCH_BOX(&vqkernels::bias_gelu_backward_cpu));
}
