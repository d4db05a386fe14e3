#include "cpu/nearest_code.h"

#include <tuple>

#include "binding.h"

namespace vqkernels {
namespace {

std::tuple<Tensor, Tensor> nearest_code_cpu(const Tensor& z, const Tensor& codebook, std::string metric,
                                            std::optional<Tensor> mask) {
  const cpu::KeepSubnormals mode;
  const SearchInputs in = search_inputs(z, codebook, metric, mask);
  Tensor indices = empty(in.z, {in.heads, in.rows}, ScalarType::Long);
  Tensor scores = empty(in.z, {in.heads, in.rows}, accumulation_type(in.z));
  cpu::nearest_code(in.cpu_problem(), scores.mutable_data_ptr(), indices.mutable_data_ptr<int64_t>(), torch_threads());
  return {indices, scores};
}

#ifdef VQKERNELS_CUDA
std::tuple<Tensor, Tensor> nearest_code_cuda(const Tensor& z, const Tensor& codebook, std::string metric,
                                             std::optional<Tensor> mask) {
  const CudaDevice device(z);
  const SearchInputs in = search_inputs(z, codebook, metric, mask);
  Tensor indices = empty(in.z, {in.heads, in.rows}, ScalarType::Long);
  Tensor scores = empty(in.z, {in.heads, in.rows}, accumulation_type(in.z));
  search_on_cuda(in, widened(in.z), widened(in.codebook), device, scores, indices);
  return {indices, scores};
}
#endif

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("nearest_code", TORCH_BOX(&vqkernels::nearest_code_cpu)); }
#ifdef VQKERNELS_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) { m.impl("nearest_code", TORCH_BOX(&vqkernels::nearest_code_cuda)); }
#endif
