#include "cpu/topk_codes.h"

#include <tuple>

#include "binding.h"
#ifdef VQKERNELS_CUDA
#include "cuda/topk_codes.h"
#endif

namespace vqkernels {
namespace {

std::tuple<Tensor, Tensor> topk_codes_cpu(const Tensor& z, const Tensor& codebook, int64_t k, std::string metric,
                                          std::optional<Tensor> mask) {
  const cpu::KeepSubnormals mode;
  const SearchInputs in = search_inputs(z, codebook, metric, mask);
  STD_TORCH_CHECK(k > 0, "vqkernels: expected k of at least 1");
  Tensor indices = empty(in.z, {in.heads, in.rows, k}, ScalarType::Long);
  Tensor scores = empty(in.z, {in.heads, in.rows, k}, accumulation_type(in.z));
  cpu::topk_codes(in.cpu_problem(), k, scores.mutable_data_ptr(), indices.mutable_data_ptr<int64_t>(), torch_threads());
  return {indices, scores};
}

#ifdef VQKERNELS_CUDA
std::tuple<Tensor, Tensor> topk_codes_cuda(const Tensor& z, const Tensor& codebook, int64_t k, std::string metric,
                                           std::optional<Tensor> mask) {
  const CudaDevice device(z);
  const SearchInputs in = search_inputs(z, codebook, metric, mask);
  STD_TORCH_CHECK(k > 0, "vqkernels: expected k of at least 1");
  const Tensor wide_z = widened(in.z), wide_codebook = widened(in.codebook);
  Tensor indices = empty(in.z, {in.heads, in.rows, k}, ScalarType::Long);
  Tensor scores = empty(in.z, {in.heads, in.rows, k}, accumulation_type(in.z));
  const cuda::NearestCodeProblem problem = cuda_search_problem(in, wide_z, wide_codebook);
  Tensor workspace = work_memory(in.z, cuda::topk_codes_workspace(problem));
  cuda::topk_codes(problem, k, workspace.mutable_data_ptr(), scores.mutable_data_ptr(),
                   indices.mutable_data_ptr<int64_t>(), device.stream);
  return {indices, scores};
}
#endif

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("topk_codes", TORCH_BOX(&vqkernels::topk_codes_cpu)); }
#ifdef VQKERNELS_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) { m.impl("topk_codes", TORCH_BOX(&vqkernels::topk_codes_cuda)); }
#endif
