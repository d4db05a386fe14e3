#include "cpu/code_statistics.h"

#include <tuple>

#include "binding.h"

namespace vqkernels {
namespace {

std::tuple<Tensor, Tensor> code_statistics_cpu(const Tensor& z, const Tensor& indices, int64_t num_codes) {
  const cpu::KeepSubnormals mode;
  STD_TORCH_CHECK(z.dim() == 3, "vqkernels: expected z [H, N, D]");
  STD_TORCH_CHECK(num_codes > 0, "vqkernels: expected num_codes of at least 1");
  const int64_t heads = z.size(0), rows = z.size(1), dim = z.size(2);
  check_shape(indices, "indices", {heads, rows});
  check_type(indices, "indices", ScalarType::Long);
  check_same_device(indices, "indices", z);
  const Tensor dense_z = torch::stable::contiguous(z), dense_indices = torch::stable::contiguous(indices);
  Tensor counts = empty(z, {heads, num_codes}, ScalarType::Long);
  Tensor sums = empty(z, {heads, num_codes, dim}, accumulation_type(z));
  const cpu::CodeStatisticsProblem problem{
      dense_z.const_data_ptr(), dense_indices.const_data_ptr<int64_t>(), dtype_of(z, "z"), heads, rows, num_codes, dim};
  cpu::code_statistics(problem, counts.mutable_data_ptr<int64_t>(), sums.mutable_data_ptr(), torch_threads());
  return {counts, sums};
}

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("code_statistics", TORCH_BOX(&vqkernels::code_statistics_cpu)); }
