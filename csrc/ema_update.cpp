#include "cpu/ema_update.h"

#include "binding.h"
#ifdef VQKERNELS_CUDA
#include "cuda/ema_update.h"
#endif

namespace vqkernels {
namespace {

// Checks the arguments and calls run with contiguous ones: codebook, cluster_size, code_sum, counts, sums.
template <class Run>
void update_in_place(const Tensor& codebook, const Tensor& cluster_size, const Tensor& code_sum, const Tensor& counts,
                     const Tensor& sums, const Run& run) {
  STD_TORCH_CHECK(codebook.dim() == 3, "vqkernels: expected codebook [H, K, D]");
  const int64_t heads = codebook.size(0), codes = codebook.size(1), dim = codebook.size(2);
  check_type(codebook, "codebook", ScalarType::Float);
  check_shape(cluster_size, "cluster_size", {heads, codes});
  check_type(cluster_size, "cluster_size", ScalarType::Float);
  check_shape(code_sum, "code_sum", {heads, codes, dim});
  check_type(code_sum, "code_sum", ScalarType::Float);
  check_shape(counts, "counts", {heads, codes});
  check_type(counts, "counts", ScalarType::Long);
  check_shape(sums, "sums", {heads, codes, dim});
  check_type(sums, "sums", ScalarType::Float);
  check_same_device(cluster_size, "cluster_size", codebook);
  check_same_device(code_sum, "code_sum", codebook);
  check_same_device(counts, "counts", codebook);
  check_same_device(sums, "sums", codebook);

  // Views that are not contiguous are updated in a copy and written back.
  const Tensor state[3] = {torch::stable::contiguous(codebook), torch::stable::contiguous(cluster_size),
                           torch::stable::contiguous(code_sum)};
  const Tensor dense_counts = torch::stable::contiguous(counts), dense_sums = torch::stable::contiguous(sums);
  run(state[0], state[1], state[2], dense_counts, dense_sums);
  Tensor out[3] = {codebook, cluster_size, code_sum};
  for (int i = 0; i < 3; ++i) {
    if (!out[i].is_contiguous()) torch::stable::copy_(out[i], state[i]);
  }
}

template <class Problem>
Problem ema_problem(const Tensor& codebook, const Tensor& cluster_size, const Tensor& code_sum, const Tensor& counts,
                    const Tensor& sums, double decay, double eps) {
  return {static_cast<float*>(codebook.mutable_data_ptr()),
          static_cast<float*>(cluster_size.mutable_data_ptr()),
          static_cast<float*>(code_sum.mutable_data_ptr()),
          counts.const_data_ptr<int64_t>(),
          sums.const_data_ptr<float>(),
          codebook.size(0),
          codebook.size(1),
          codebook.size(2),
          decay,
          eps};
}

void ema_update_cpu(const Tensor& codebook, const Tensor& cluster_size, const Tensor& code_sum, const Tensor& counts,
                    const Tensor& sums, double decay, double eps) {
  const cpu::KeepSubnormals mode;
  update_in_place(codebook, cluster_size, code_sum, counts, sums, [&](const auto&... dense) {
    cpu::ema_update(ema_problem<cpu::EmaUpdateProblem>(dense..., decay, eps), torch_threads());
  });
}

#ifdef VQKERNELS_CUDA
void ema_update_cuda(const Tensor& codebook, const Tensor& cluster_size, const Tensor& code_sum, const Tensor& counts,
                     const Tensor& sums, double decay, double eps) {
  const CudaDevice device(codebook);
  update_in_place(codebook, cluster_size, code_sum, counts, sums, [&](const auto&... dense) {
    Tensor totals = empty(codebook, {codebook.size(0)}, ScalarType::Float);
    cuda::ema_update(ema_problem<cuda::EmaUpdateProblem>(dense..., decay, eps),
                     static_cast<float*>(totals.mutable_data_ptr()), device.stream);
  });
}
#endif

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("ema_update_", TORCH_BOX(&vqkernels::ema_update_cpu)); }
#ifdef VQKERNELS_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) { m.impl("ema_update_", TORCH_BOX(&vqkernels::ema_update_cuda)); }
#endif
