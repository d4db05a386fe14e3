#include "feed_forward.h"

namespace vqkernels {
namespace {

Tensor swiglu_cpu(const Tensor& x, OptionalTensor bias, std::string gate) {
  return gated_activation(x, bias, gate, cpu::Activation::silu);
}

std::tuple<Tensor, Tensor> swiglu_backward_cpu(const Tensor& grad_y, const Tensor& x, OptionalTensor bias,
                                               std::string gate, bool bias_gradient) {
  return gated_activation_backward(grad_y, x, bias, gate, cpu::Activation::silu, bias_gradient);
}

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&vqkernels::swiglu_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&vqkernels::swiglu_backward_cpu));
}
