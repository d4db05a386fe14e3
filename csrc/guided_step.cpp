#include "cpu/guided_step.h"

#include <vector>

#include "binding.h"

namespace vqkernels {
namespace {

// Rows [B, N] whose numbers are adjacent: others are copied, to what keeps them alive.
cpu::Rows rows_of(const Tensor& t, std::vector<Tensor>& kept) {
  kept.push_back(t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t));
  return {kept.back().const_data_ptr(), kept.back().stride(0)};
}

Tensor guided_step_cpu(const Tensor& sample, const Tensor& output, const std::optional<Tensor>& unconditional,
                       const std::optional<Tensor>& noise, const std::optional<Tensor>& variance, int64_t period,
                       int64_t guided, double guidance_scale, double clean_sample, double clean_output, double clip,
                       double step_sample, double step_clean, double noise_scale, double min_log_variance,
                       double max_log_variance) {
  const cpu::KeepSubnormals mode;
  STD_TORCH_CHECK(sample.dim() == 2, "vqkernels: expected sample [B, N]");
  STD_TORCH_CHECK(0 <= guided && guided <= period && (period > 0 || sample.size(1) == 0),
                  "vqkernels: expected 0 <= guided <= period");
  STD_TORCH_CHECK(!variance || noise, "vqkernels: expected noise with variance");
  const int64_t rows = sample.size(0), size = sample.size(1);
  std::vector<Tensor> kept;
  const auto checked_rows = [&](const std::optional<Tensor>& t, const char* name, ScalarType type) {
    if (!t) return cpu::Rows{};
    check_shape(*t, name, {rows, size});
    check_type(*t, name, type);
    check_same_device(*t, name, sample);
    return rows_of(*t, kept);
  };
  const bool is_double = sample.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double == (output.scalar_type() == ScalarType::Double),
                  "vqkernels: expected sample and output both in float64 or neither");
  Tensor next = empty(sample, {rows, size}, sample.scalar_type());
  const cpu::GuidedStepProblem problem = {rows_of(sample, kept),
                                          checked_rows(output, "output", output.scalar_type()),
                                          checked_rows(unconditional, "unconditional", output.scalar_type()),
                                          checked_rows(noise, "noise", sample.scalar_type()),
                                          checked_rows(variance, "variance", output.scalar_type()),
                                          dtype_of(sample, "sample"),
                                          dtype_of(output, "output"),
                                          rows,
                                          size,
                                          period,
                                          guided,
                                          guidance_scale,
                                          clean_sample,
                                          clean_output,
                                          clip,
                                          step_sample,
                                          step_clean,
                                          noise_scale,
                                          min_log_variance,
                                          max_log_variance};
  cpu::guided_step(problem, next.mutable_data_ptr(), torch_threads());
  return next;
}

}  // namespace
}  // namespace vqkernels

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("guided_step", TORCH_BOX(&vqkernels::guided_step_cpu)); }
