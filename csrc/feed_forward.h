// What the bindings of the feed-forward operations share: GELU's variants, and gated activations.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "cpu/gated_activation.h"
#include "modulation.h"

namespace vqkernels {

inline cpu::Activation gelu_of(const std::string& approximate) {
  if (approximate == "tanh") return cpu::Activation::gelu_tanh;
  STD_TORCH_CHECK(approximate == "none", "vqkernels: unknown approximation ", approximate);
  return cpu::Activation::gelu;
}

// The dtype that x and bias promote to.
inline ScalarType biased_type(const Tensor& x, const OptionalTensor& bias) {
  return bias ? promoted(x.scalar_type(), bias->scalar_type()) : x.scalar_type();
}

// The gradient of a bias; empty where it is not wanted.
inline Tensor empty_bias_gradient(const Tensor& x, const OptionalTensor& bias, bool wanted) {
  STD_TORCH_CHECK(bias || !wanted, "vqkernels: expected a bias whose gradient is wanted");
  return empty(x, {wanted ? x.size(2) : 0}, bias ? bias->scalar_type() : x.scalar_type());
}

inline cpu::GradientOut bias_sum(Tensor& grad_bias, bool wanted) {
  if (!wanted) return {};
  return {grad_bias.mutable_data_ptr(), dtype_of(grad_bias, "grad_bias"), cpu::Layout::of_all};
}

// The gradient of a result. One that is wider than the arithmetic is rounded: kernels read nothing wider.
inline cpu::RowsView gradient_view(const Tensor& grad_y, bool wide, std::vector<Tensor>& kept) {
  const bool narrows = !wide && grad_y.scalar_type() == ScalarType::Double;
  const Tensor grad = narrows ? torch::stable::to(grad_y, ScalarType::Float) : grad_y;
  return rows_view(grad, "grad_y", grad, false, kept);
}

inline cpu::GatedActivationProblem gated_problem(const Tensor& x, const OptionalTensor& bias, const std::string& gate,
                                                 cpu::Activation activation, std::vector<Tensor>& kept) {
  const Sizes sizes = sizes_of(x);
  STD_TORCH_CHECK(sizes.dim % 2 == 0, "vqkernels: expected x [B, L, 2 D]");
  STD_TORCH_CHECK(gate == "first" || gate == "second", "vqkernels: unknown gate ", gate);
  const bool wide = biased_type(x, bias) == ScalarType::Double;
  return {rows_view(x, "x", x, false, kept),
          parameter(bias, "bias", x, wide ? ScalarType::Double : ScalarType::Float, kept),
          activation,
          gate == "first",
          sizes.batch,
          sizes.length,
          sizes.dim / 2,
          wide};
}

inline Tensor gated_activation(const Tensor& x, const OptionalTensor& bias, const std::string& gate,
                               cpu::Activation activation) {
  const cpu::KeepSubnormals mode;
  std::vector<Tensor> kept;
  const cpu::GatedActivationProblem p = gated_problem(x, bias, gate, activation, kept);
  Tensor y = empty(x, {p.batch, p.length, p.dim}, biased_type(x, bias));
  cpu::gated_activation(p, rows_out(y), torch_threads());
  return y;
}

inline std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad_y, const Tensor& x,
                                                            const OptionalTensor& bias, const std::string& gate,
                                                            cpu::Activation activation, bool bias_gradient) {
  const cpu::KeepSubnormals mode;
  std::vector<Tensor> kept;
  const cpu::GatedActivationProblem p = gated_problem(x, bias, gate, activation, kept);
  check_shape(grad_y, "grad_y", {p.batch, p.length, p.dim});
  check_same_device(grad_y, "grad_y", x);
  Tensor grad_x = empty(x, {p.batch, p.length, 2 * p.dim}, x.scalar_type());
  Tensor grad_bias = empty_bias_gradient(x, bias, bias_gradient);
  const cpu::GatedActivationGradient g{
      gradient_view(grad_y, p.wide, kept), rows_out(grad_x), {bias_sum(grad_bias, bias_gradient)}};
  cpu::gated_activation_backward(p, g, torch_threads());
  return {grad_x, grad_bias};
}

}  // namespace vqkernels
