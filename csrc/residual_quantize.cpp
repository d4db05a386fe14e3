#include "cpu/residual_quantize.h"

#include <tuple>
#include <vector>

#include "binding.h"
#ifdef VQKERNELS_CUDA
#include "cuda/residual_quantize.h"
#endif

namespace vqkernels {
namespace {

// z [H, N, D] and codebooks [H, sum of sizes, D], contiguous and of types that go together.
struct ResidualInputs {
  SearchInputs search;
  std::vector<int64_t> sizes;
  std::optional<Tensor> num_levels;  // [H, N]
  std::optional<Tensor> indices;     // [H, N, Q]

  int64_t levels() const { return static_cast<int64_t>(sizes.size()); }

  cpu::ResidualProblem cpu_problem() const {
    return {search.z.const_data_ptr(),
            search.codebook.const_data_ptr(),
            sizes.data(),
            search.mask ? static_cast<const bool*>(search.mask->const_data_ptr()) : nullptr,
            num_levels ? num_levels->const_data_ptr<int64_t>() : nullptr,
            indices ? indices->const_data_ptr<int64_t>() : nullptr,
            dtype_of(search.z, "z"),
            dtype_of(search.codebook, "codebooks"),
            search.metric,
            search.heads,
            search.rows,
            levels(),
            search.codes,
            search.dim};
  }
};

ResidualInputs residual_inputs(const Tensor& z, const Tensor& codebooks, std::vector<int64_t> sizes,
                               const std::string& metric, const std::optional<Tensor>& mask,
                               const std::optional<Tensor>& num_levels, const std::optional<Tensor>& indices) {
  ResidualInputs in{search_inputs(z, codebooks, metric, mask), std::move(sizes), std::nullopt, std::nullopt};
  int64_t codes = 0;
  for (const int64_t size : in.sizes) {
    STD_TORCH_CHECK(size > 0 && size <= in.search.codes, "vqkernels: expected sizes of at least 1");
    codes += size;
  }
  STD_TORCH_CHECK(codes == in.search.codes, "vqkernels: expected sizes that add up to the codes of codebooks");
  if (num_levels) {
    check_shape(*num_levels, "num_levels", {in.search.heads, in.search.rows});
    check_type(*num_levels, "num_levels", ScalarType::Long);
    check_same_device(*num_levels, "num_levels", z);
    in.num_levels = torch::stable::contiguous(*num_levels);
  }
  if (indices) {
    check_shape(*indices, "indices", {in.search.heads, in.search.rows, in.levels()});
    check_type(*indices, "indices", ScalarType::Long);
    check_same_device(*indices, "indices", z);
    in.indices = torch::stable::contiguous(*indices);
  }
  return in;
}

// What is below 0 counts as -1.
void check_index_range(const ResidualInputs& in) {
  if (!in.indices) return;
  const int64_t* index = in.indices->const_data_ptr<int64_t>();
  for (int64_t row = 0; row < in.search.heads * in.search.rows; ++row) {
    for (const int64_t size : in.sizes) {
      STD_TORCH_CHECK(*index++ < size, "vqkernels: indices are out of range");
    }
  }
}

void set_values(Tensor& t, const std::vector<double>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (t.scalar_type() == ScalarType::Double) {
      static_cast<double*>(t.mutable_data_ptr())[i] = values[i];
    } else {
      static_cast<float*>(t.mutable_data_ptr())[i] = static_cast<float>(values[i]);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_quantize_cpu(const Tensor& z, const Tensor& codebooks,
                                                                 std::vector<int64_t> sizes, std::string metric,
                                                                 std::optional<Tensor> mask,
                                                                 std::optional<Tensor> num_levels,
                                                                 std::optional<Tensor> indices) {
  const cpu::KeepSubnormals mode;
  const ResidualInputs in = residual_inputs(z, codebooks, std::move(sizes), metric, mask, num_levels, indices);
  check_index_range(in);
  const SearchInputs& s = in.search;
  Tensor quantized = empty(s.z, {s.heads, s.rows, s.dim}, s.z.scalar_type());
  Tensor found = empty(s.z, {s.heads, s.rows, in.levels()}, ScalarType::Long);
  Tensor mse = empty(s.z, {s.heads, in.levels()}, accumulation_type(s.z));
  Tensor valid_rows = empty(s.z, {s.heads, in.levels()}, ScalarType::Long);
  std::vector<double> errors(static_cast<size_t>(s.heads * in.levels()));
  cpu::residual_quantize(in.cpu_problem(), quantized.mutable_data_ptr(), found.mutable_data_ptr<int64_t>(),
                         errors.data(), valid_rows.mutable_data_ptr<int64_t>(), torch_threads());
  set_values(mse, errors);
  if (quantized.scalar_type() != z.scalar_type()) quantized = torch::stable::to(quantized, z.scalar_type());
  return {quantized, found, mse, valid_rows};
}

// What the gradient is computed from, contiguous and of types that go together.
struct ResidualGradientInputs {
  ResidualInputs residual;
  std::optional<Tensor> grad_quantized;  // [H, N, D], in the type of z
  std::optional<Tensor> grad_mse;        // [H, Q], float or double
  Tensor valid_rows;                     // [H, Q]
  Estimator estimator;
};

ResidualGradientInputs residual_gradient_inputs(const std::optional<Tensor>& grad_quantized,
                                                const std::optional<Tensor>& grad_mse, const Tensor& z,
                                                const Tensor& codebooks, std::vector<int64_t> sizes,
                                                const Tensor& indices, const Tensor& valid_rows,
                                                const std::string& gradient) {
  const ResidualInputs in = residual_inputs(z, codebooks, std::move(sizes), "l2", std::nullopt, std::nullopt, indices);
  const SearchInputs& s = in.search;
  check_shape(valid_rows, "valid_rows", {s.heads, in.levels()});
  check_type(valid_rows, "valid_rows", ScalarType::Long);
  check_same_device(valid_rows, "valid_rows", z);
  std::optional<Tensor> dense_mse, dense_grad;
  if (grad_mse) {
    check_shape(*grad_mse, "grad_mse", {s.heads, in.levels()});
    check_type(*grad_mse, "grad_mse", accumulation_type(s.z));
    check_same_device(*grad_mse, "grad_mse", z);
    dense_mse = torch::stable::contiguous(*grad_mse);
  }
  if (grad_quantized) {
    check_shape(*grad_quantized, "grad_quantized", {s.heads, s.rows, s.dim});
    check_same_device(*grad_quantized, "grad_quantized", z);
    dense_grad = torch::stable::contiguous(torch::stable::to(*grad_quantized, s.z.scalar_type()));
  }
  return {in, dense_grad, dense_mse, torch::stable::contiguous(valid_rows), estimator_of(gradient)};
}

Tensor residual_quantize_backward_cpu(std::optional<Tensor> grad_quantized, std::optional<Tensor> grad_mse,
                                      const Tensor& z, const Tensor& codebooks, std::vector<int64_t> sizes,
                                      const Tensor& indices, const Tensor& valid_rows, std::string gradient) {
  const cpu::KeepSubnormals mode;
  const ResidualGradientInputs inputs =
      residual_gradient_inputs(grad_quantized, grad_mse, z, codebooks, std::move(sizes), indices, valid_rows, gradient);
  const ResidualInputs& in = inputs.residual;
  check_index_range(in);
  const SearchInputs& s = in.search;
  std::vector<double> coefficients(static_cast<size_t>(s.heads * in.levels()));
  const int64_t* valid = inputs.valid_rows.const_data_ptr<int64_t>();
  for (size_t i = 0; inputs.grad_mse && i < coefficients.size(); ++i) {
    const void* grad = inputs.grad_mse->const_data_ptr();
    const double value = inputs.grad_mse->scalar_type() == ScalarType::Double ? static_cast<const double*>(grad)[i]
                                                                              : static_cast<const float*>(grad)[i];
    if (valid[i] > 0) coefficients[i] = value * 2 / static_cast<double>(valid[i] * s.dim);
  }
  Tensor grad_z = empty(s.z, {s.heads, s.rows, s.dim}, s.z.scalar_type());
  cpu::residual_quantize_backward(in.cpu_problem(), in.indices->const_data_ptr<int64_t>(),
                                  inputs.grad_quantized ? inputs.grad_quantized->const_data_ptr() : nullptr,
                                  inputs.estimator, coefficients.data(), grad_z.mutable_data_ptr(), torch_threads());
  if (grad_z.scalar_type() != z.scalar_type()) grad_z = torch::stable::to(grad_z, z.scalar_type());
  return grad_z;
}

std::tuple<Tensor, Tensor> residual_statistics_cpu(const Tensor& z, const Tensor& codebooks, std::vector<int64_t> sizes,
                                                   const Tensor& indices) {
  const cpu::KeepSubnormals mode;
  const ResidualInputs in = residual_inputs(z, codebooks, std::move(sizes), "l2", std::nullopt, std::nullopt, indices);
  const SearchInputs& s = in.search;
  Tensor counts = empty(s.z, {s.heads, s.codes}, ScalarType::Long);
  Tensor sums = empty(s.z, {s.heads, s.codes, s.dim}, accumulation_type(s.z));
  cpu::residual_statistics(in.cpu_problem(), in.indices->const_data_ptr<int64_t>(), counts.mutable_data_ptr<int64_t>(),
                           sums.mutable_data_ptr(), torch_threads());
  return {counts, sums};
}

#ifdef VQKERNELS_CUDA
cuda::Levels cuda_levels(const ResidualInputs& in) {
  STD_TORCH_CHECK(in.levels() <= cuda::kMaxLevels, "vqkernels: expected at most ", cuda::kMaxLevels, " levels");
  return cuda::make_levels(in.sizes.data(), in.levels());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_quantize_cuda(const Tensor& z, const Tensor& codebooks,
                                                                  std::vector<int64_t> sizes, std::string metric,
                                                                  std::optional<Tensor> mask,
                                                                  std::optional<Tensor> num_levels,
                                                                  std::optional<Tensor> indices) {
  const CudaDevice device(z);
  const ResidualInputs in = residual_inputs(z, codebooks, std::move(sizes), metric, mask, num_levels, indices);
  const SearchInputs& s = in.search;
  const Tensor wide_codebooks = widened(s.codebook);
  Tensor quantized = empty(s.z, {s.heads, s.rows, s.dim}, s.z.scalar_type());
  Tensor found = empty(s.z, {s.heads, s.rows, in.levels()}, ScalarType::Long);
  Tensor mse = empty(s.z, {s.heads, in.levels()}, accumulation_type(s.z));
  Tensor valid_rows = empty(s.z, {s.heads, in.levels()}, ScalarType::Long);
  const cuda::ResidualProblem problem{s.z.const_data_ptr(),
                                      wide_codebooks.const_data_ptr(),
                                      s.mask ? static_cast<const bool*>(s.mask->const_data_ptr()) : nullptr,
                                      in.num_levels ? in.num_levels->const_data_ptr<int64_t>() : nullptr,
                                      in.indices ? in.indices->const_data_ptr<int64_t>() : nullptr,
                                      dtype_of(s.z, "z"),
                                      s.metric,
                                      s.heads,
                                      s.rows,
                                      s.dim,
                                      cuda_levels(in)};
  Tensor workspace = work_memory(s.z, cuda::residual_quantize_workspace(problem));
  cuda::residual_quantize(problem, workspace.mutable_data_ptr(), quantized.mutable_data_ptr(),
                          found.mutable_data_ptr<int64_t>(), mse.mutable_data_ptr(),
                          valid_rows.mutable_data_ptr<int64_t>(), device.stream);
  if (quantized.scalar_type() != z.scalar_type()) quantized = torch::stable::to(quantized, z.scalar_type());
  return {quantized, found, mse, valid_rows};
}

// As in vector_quantize_backward, indices that are out of range belong to no code.
Tensor residual_quantize_backward_cuda(std::optional<Tensor> grad_quantized, std::optional<Tensor> grad_mse,
                                       const Tensor& z, const Tensor& codebooks, std::vector<int64_t> sizes,
                                       const Tensor& indices, const Tensor& valid_rows, std::string gradient) {
  const CudaDevice device(z);
  const ResidualGradientInputs inputs =
      residual_gradient_inputs(grad_quantized, grad_mse, z, codebooks, std::move(sizes), indices, valid_rows, gradient);
  const ResidualInputs& in = inputs.residual;
  const SearchInputs& s = in.search;
  const Tensor wide_codebooks = widened(s.codebook);
  Tensor grad_z = empty(s.z, {s.heads, s.rows, s.dim}, s.z.scalar_type());
  const cuda::ResidualGradientProblem problem{inputs.grad_quantized ? inputs.grad_quantized->const_data_ptr() : nullptr,
                                              inputs.grad_mse ? inputs.grad_mse->const_data_ptr() : nullptr,
                                              s.z.const_data_ptr(),
                                              wide_codebooks.const_data_ptr(),
                                              in.indices->const_data_ptr<int64_t>(),
                                              inputs.valid_rows.const_data_ptr<int64_t>(),
                                              dtype_of(s.z, "z"),
                                              inputs.estimator,
                                              s.heads,
                                              s.rows,
                                              s.dim,
                                              cuda_levels(in)};
  Tensor workspace = work_memory(s.z, cuda::residual_quantize_backward_workspace(problem));
  cuda::residual_quantize_backward(problem, workspace.mutable_data_ptr(), grad_z.mutable_data_ptr(), device.stream);
  if (grad_z.scalar_type() != z.scalar_type()) grad_z = torch::stable::to(grad_z, z.scalar_type());
  return grad_z;
}

std::tuple<Tensor, Tensor> residual_statistics_cuda(const Tensor& z, const Tensor& codebooks,
                                                    std::vector<int64_t> sizes, const Tensor& indices) {
  const CudaDevice device(z);
  const ResidualInputs in = residual_inputs(z, codebooks, std::move(sizes), "l2", std::nullopt, std::nullopt, indices);
  const SearchInputs& s = in.search;
  const Tensor wide_codebooks = widened(s.codebook);
  Tensor counts = empty(s.z, {s.heads, s.codes}, ScalarType::Long);
  Tensor sums = empty(s.z, {s.heads, s.codes, s.dim}, accumulation_type(s.z));
  const cuda::ResidualStatisticsProblem problem{s.z.const_data_ptr(),
                                                wide_codebooks.const_data_ptr(),
                                                in.indices->const_data_ptr<int64_t>(),
                                                dtype_of(s.z, "z"),
                                                s.heads,
                                                s.rows,
                                                s.dim,
                                                cuda_levels(in)};
  Tensor workspace = work_memory(s.z, cuda::residual_statistics_workspace(problem));
  cuda::residual_statistics(problem, workspace.mutable_data_ptr(), counts.mutable_data_ptr<int64_t>(),
                            sums.mutable_data_ptr(), device.stream);
  return {counts, sums};
}
#endif

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("residual_quantize", TORCH_BOX(&vqkernels::residual_quantize_cpu));
  m.impl("residual_quantize_backward", TORCH_BOX(&vqkernels::residual_quantize_backward_cpu));
  m.impl("residual_statistics", TORCH_BOX(&vqkernels::residual_statistics_cpu));
}
#ifdef VQKERNELS_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) {
  m.impl("residual_quantize", TORCH_BOX(&vqkernels::residual_quantize_cuda));
  m.impl("residual_quantize_backward", TORCH_BOX(&vqkernels::residual_quantize_backward_cuda));
  m.impl("residual_statistics", TORCH_BOX(&vqkernels::residual_statistics_cuda));
}
#endif
