#include "cpu/ema_update.h"

#include "binding.h"

namespace vqkernels {
namespace {

void ema_update_cpu(const Tensor& codebook, const Tensor& cluster_size, const Tensor& code_sum, const Tensor& counts,
                    const Tensor& sums, double decay, double eps) {
  const cpu::KeepSubnormals mode;
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

  for (const Tensor* t : {&cluster_size, &code_sum, &counts, &sums}) check_same_device(*t, "an argument", codebook);

  // Views that are not contiguous are updated in a copy and written back.
  const Tensor state[3] = {torch::stable::contiguous(codebook), torch::stable::contiguous(cluster_size),
                           torch::stable::contiguous(code_sum)};
  const Tensor dense_counts = torch::stable::contiguous(counts), dense_sums = torch::stable::contiguous(sums);
  const cpu::EmaUpdateProblem problem{static_cast<float*>(state[0].mutable_data_ptr()),
                                      static_cast<float*>(state[1].mutable_data_ptr()),
                                      static_cast<float*>(state[2].mutable_data_ptr()),
                                      dense_counts.const_data_ptr<int64_t>(),
                                      dense_sums.const_data_ptr<float>(),
                                      heads,
                                      codes,
                                      dim,
                                      decay,
                                      eps};
  cpu::ema_update(problem, torch_threads());
  Tensor out[3] = {codebook, cluster_size, code_sum};
  for (int i = 0; i < 3; ++i) {
    if (!out[i].is_contiguous()) torch::stable::copy_(out[i], state[i]);
  }
}

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("ema_update_", TORCH_BOX(&vqkernels::ema_update_cpu)); }
