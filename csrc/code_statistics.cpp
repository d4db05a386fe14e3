#include "cpu/code_statistics.h"

#include <tuple>

#include "binding.h"
#ifdef VQKERNELS_CUDA
#include "cuda/code_statistics.h"
#endif

namespace vqkernels {
namespace {

void check_statistics_inputs(const Tensor& z, const Tensor& indices, int64_t num_codes) {
  STD_TORCH_CHECK(z.dim() == 3, "vqkernels: expected z [H, N, D]");
  STD_TORCH_CHECK(num_codes > 0, "vqkernels: expected num_codes of at least 1");
  check_shape(indices, "indices", {z.size(0), z.size(1)});
  check_type(indices, "indices", ScalarType::Long);
  check_same_device(indices, "indices", z);
}

std::tuple<Tensor, Tensor> code_statistics_cpu(const Tensor& z, const Tensor& indices, int64_t num_codes) {
  const cpu::KeepSubnormals mode;
  check_statistics_inputs(z, indices, num_codes);
  const int64_t heads = z.size(0), rows = z.size(1), dim = z.size(2);
  const Tensor dense_z = torch::stable::contiguous(z), dense_indices = torch::stable::contiguous(indices);
  Tensor counts = empty(z, {heads, num_codes}, ScalarType::Long);
  Tensor sums = empty(z, {heads, num_codes, dim}, accumulation_type(z));
  const cpu::CodeStatisticsProblem problem{
      dense_z.const_data_ptr(), dense_indices.const_data_ptr<int64_t>(), dtype_of(z, "z"), heads, rows, num_codes, dim};
  cpu::code_statistics(problem, counts.mutable_data_ptr<int64_t>(), sums.mutable_data_ptr(), torch_threads());
  return {counts, sums};
}

#ifdef VQKERNELS_CUDA
std::tuple<Tensor, Tensor> code_statistics_cuda(const Tensor& z, const Tensor& indices, int64_t num_codes) {
  check_statistics_inputs(z, indices, num_codes);
  const CudaDevice device(z);
  const int64_t heads = z.size(0), rows = z.size(1), dim = z.size(2);
  const Tensor dense_z = torch::stable::contiguous(z), dense_indices = torch::stable::contiguous(indices);
  Tensor counts = empty(z, {heads, num_codes}, ScalarType::Long);
  Tensor sums = empty(z, {heads, num_codes, dim}, accumulation_type(z));
  const cuda::CodeStatisticsProblem problem{dense_z.const_data_ptr(),
                                            dense_indices.const_data_ptr<int64_t>(),
                                            dtype_of(z, "z"),
                                            heads,
                                            rows,
                                            num_codes,
                                            dim,
                                            num_codes};
  Tensor workspace = work_memory(z, cuda::code_statistics_workspace(problem));
  cuda::code_statistics(problem, workspace.mutable_data_ptr(), counts.mutable_data_ptr<int64_t>(),
                        sums.mutable_data_ptr(), device.stream);
  return {counts, sums};
}
#endif

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("code_statistics", TORCH_BOX(&vqkernels::code_statistics_cpu)); }
#ifdef VQKERNELS_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) {
  m.impl("code_statistics", TORCH_BOX(&vqkernels::code_statistics_cuda));
}
#endif
