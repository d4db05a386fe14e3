#include "feed_forward.h"

namespace vqkernels {
namespace {

Tensor geglu_cpu(const Tensor& x, OptionalTensor bias, std::string gate, std::string approximate) {
  return gated_activation(x, bias, gate, gelu_of(approximate));
}

std::tuple<Tensor, Tensor> geglu_backward_cpu(const Tensor& grad_y, const Tensor& x, OptionalTensor bias,
                                              std::string gate, std::string approximate, bool bias_gradient) {
  return gated_activation_backward(grad_y, x, bias, gate, gelu_of(approximate), bias_gradient);
}

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("geglu", TORCH_BOX(&vqkernels::geglu_cpu));
  m.impl("geglu_backward", TORCH_BOX(&vqkernels::geglu_backward_cpu));
}
