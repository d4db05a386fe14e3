#include "cpu/vector_quantize.h"

#include <tuple>

#include "binding.h"
#ifdef VQKERNELS_CUDA
#include "cuda/vector_quantize.h"
#endif

namespace vqkernels {
namespace {

// Scalars of the accumulation type travel as tensors, so that no device has to wait for its host.
void set_scalar(Tensor& t, double value) {
  if (t.scalar_type() == ScalarType::Double) {
    *static_cast<double*>(t.mutable_data_ptr()) = value;
  } else {
    *static_cast<float*>(t.mutable_data_ptr()) = static_cast<float>(value);
  }
}

double get_scalar(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(t.const_data_ptr())
                                               : *static_cast<const float*>(t.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> vector_quantize_cpu(const Tensor& z, const Tensor& codebook,
                                                               std::string metric, std::optional<Tensor> mask) {
  const cpu::KeepSubnormals mode;
  const SearchInputs in = search_inputs(z, codebook, metric, mask);
  Tensor quantized = empty(in.z, {in.heads, in.rows, in.dim}, in.z.scalar_type());
  Tensor indices = empty(in.z, {in.heads, in.rows}, ScalarType::Long);
  Tensor mse = empty(in.z, {}, accumulation_type(in.z));
  Tensor valid_rows = empty(in.z, {}, ScalarType::Long);
  const cpu::QuantizeResult result = cpu::vector_quantize(in.cpu_problem(), quantized.mutable_data_ptr(),
                                                          indices.mutable_data_ptr<int64_t>(), torch_threads());
  set_scalar(mse, result.mse);
  *valid_rows.mutable_data_ptr<int64_t>() = result.valid_rows;
  if (quantized.scalar_type() != z.scalar_type()) quantized = torch::stable::to(quantized, z.scalar_type());
  return {quantized, indices, mse, valid_rows};
}

// What the gradient is computed from, contiguous and of types that go together.
struct GradientInputs {
  SearchInputs search;
  Tensor indices;                        // [H, N], int64
  std::optional<Tensor> grad_quantized;  // [H, N, D], in the type of search.z
  Estimator estimator;
};

GradientInputs gradient_inputs(const std::optional<Tensor>& grad_quantized, const std::optional<Tensor>& grad_mse,
                               const Tensor& z, const Tensor& codebook, const Tensor& indices, const Tensor& valid_rows,
                               const std::string& gradient) {
  const SearchInputs in = search_inputs(z, codebook, "l2", std::nullopt);
  check_shape(indices, "indices", {in.heads, in.rows});
  check_type(indices, "indices", ScalarType::Long);
  check_same_device(indices, "indices", z);
  check_shape(valid_rows, "valid_rows", {});
  check_type(valid_rows, "valid_rows", ScalarType::Long);
  check_same_device(valid_rows, "valid_rows", z);
  if (grad_mse) {
    check_shape(*grad_mse, "grad_mse", {});
    check_type(*grad_mse, "grad_mse", accumulation_type(in.z));
    check_same_device(*grad_mse, "grad_mse", z);
  }
  std::optional<Tensor> dense_grad;
  if (grad_quantized) {
    check_shape(*grad_quantized, "grad_quantized", {in.heads, in.rows, in.dim});
    check_same_device(*grad_quantized, "grad_quantized", z);
    dense_grad = torch::stable::contiguous(torch::stable::to(*grad_quantized, in.z.scalar_type()));
  }
  return {in, torch::stable::contiguous(indices), dense_grad, estimator_of(gradient)};
}

Tensor vector_quantize_backward_cpu(std::optional<Tensor> grad_quantized, std::optional<Tensor> grad_mse,
                                    const Tensor& z, const Tensor& codebook, const Tensor& indices,
                                    const Tensor& valid_rows, std::string gradient) {
  const cpu::KeepSubnormals mode;
  const GradientInputs inputs = gradient_inputs(grad_quantized, grad_mse, z, codebook, indices, valid_rows, gradient);
  const SearchInputs& in = inputs.search;
  const int64_t* index = inputs.indices.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < in.heads * in.rows; ++i) {
    STD_TORCH_CHECK(index[i] < in.codes, "vqkernels: indices are out of range");
  }
  double coefficient = 0;
  const int64_t valid = *valid_rows.const_data_ptr<int64_t>();
  if (grad_mse && valid > 0) {
    coefficient = get_scalar(*grad_mse) * 2 / static_cast<double>(valid * in.dim);
  }
  Tensor grad_z = empty(in.z, {in.heads, in.rows, in.dim}, in.z.scalar_type());
  cpu::vector_quantize_backward(in.cpu_problem(), index,
                                inputs.grad_quantized ? inputs.grad_quantized->const_data_ptr() : nullptr,
                                inputs.estimator, coefficient, grad_z.mutable_data_ptr(), torch_threads());
  if (grad_z.scalar_type() != z.scalar_type()) grad_z = torch::stable::to(grad_z, z.scalar_type());
  return grad_z;
}

#ifdef VQKERNELS_CUDA
// codebook: that of the inputs, widened.
cuda::QuantizeProblem cuda_problem(const SearchInputs& in, const Tensor& codebook, const Tensor& indices) {
  return {in.z.const_data_ptr(),
          codebook.const_data_ptr(),
          indices.const_data_ptr<int64_t>(),
          in.mask ? static_cast<const bool*>(in.mask->const_data_ptr()) : nullptr,
          dtype_of(in.z, "z"),
          in.heads,
          in.rows,
          in.codes,
          in.dim};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> vector_quantize_cuda(const Tensor& z, const Tensor& codebook,
                                                                std::string metric, std::optional<Tensor> mask) {
  const CudaDevice device(z);
  const SearchInputs in = search_inputs(z, codebook, metric, mask);
  const Tensor wide_codebook = widened(in.codebook);
  Tensor quantized = empty(in.z, {in.heads, in.rows, in.dim}, in.z.scalar_type());
  Tensor indices = empty(in.z, {in.heads, in.rows}, ScalarType::Long);
  Tensor mse = empty(in.z, {}, accumulation_type(in.z));
  Tensor valid_rows = empty(in.z, {}, ScalarType::Long);
  // A row's score is not needed once its index is known: its place takes the row's error.
  Tensor errors = empty(in.z, {in.heads, in.rows}, accumulation_type(in.z));
  search_on_cuda(in, widened(in.z), wide_codebook, device, errors, indices);
  cuda::vector_quantize(cuda_problem(in, wide_codebook, indices), quantized.mutable_data_ptr(),
                        errors.mutable_data_ptr(), mse.mutable_data_ptr(), valid_rows.mutable_data_ptr<int64_t>(),
                        device.stream);
  if (quantized.scalar_type() != z.scalar_type()) quantized = torch::stable::to(quantized, z.scalar_type());
  return {quantized, indices, mse, valid_rows};
}

// Indices that are out of range belong to no code: looking at them here would mean waiting for the device.
Tensor vector_quantize_backward_cuda(std::optional<Tensor> grad_quantized, std::optional<Tensor> grad_mse,
                                     const Tensor& z, const Tensor& codebook, const Tensor& indices,
                                     const Tensor& valid_rows, std::string gradient) {
  const CudaDevice device(z);
  const GradientInputs inputs = gradient_inputs(grad_quantized, grad_mse, z, codebook, indices, valid_rows, gradient);
  const SearchInputs& in = inputs.search;
  const Tensor wide_codebook = widened(in.codebook);
  Tensor grad_z = empty(in.z, {in.heads, in.rows, in.dim}, in.z.scalar_type());
  cuda::vector_quantize_backward(cuda_problem(in, wide_codebook, inputs.indices),
                                 inputs.grad_quantized ? inputs.grad_quantized->const_data_ptr() : nullptr,
                                 grad_mse ? grad_mse->const_data_ptr() : nullptr, valid_rows.const_data_ptr<int64_t>(),
                                 inputs.estimator, grad_z.mutable_data_ptr(), device.stream);
  if (grad_z.scalar_type() != z.scalar_type()) grad_z = torch::stable::to(grad_z, z.scalar_type());
  return grad_z;
}
#endif

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("vector_quantize", TORCH_BOX(&vqkernels::vector_quantize_cpu));
  m.impl("vector_quantize_backward", TORCH_BOX(&vqkernels::vector_quantize_backward_cpu));
}
#ifdef VQKERNELS_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) {
  m.impl("vector_quantize", TORCH_BOX(&vqkernels::vector_quantize_cuda));
  m.impl("vector_quantize_backward", TORCH_BOX(&vqkernels::vector_quantize_backward_cuda));
}
#endif
