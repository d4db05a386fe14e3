// Classifier-free guidance and one update of a diffusion sampler, element by element:
//     o     = unconditional + guidance_scale * (output - unconditional)     where guided, else output
//     clean = clean_sample * x + clean_output * o, clamped to [-clip, clip]
//     next  = step_sample * x + step_clean * clean + s * noise
//     s     = noise_scale, or exp((min_log_variance + (max_log_variance - min_log_variance) * (variance + 1) / 2) / 2)
#pragma once

#include <cstdint>

#include "../types.h"
#include "parallel.h"

namespace vqkernels::cpu {

// Rows of `size` adjacent numbers, `stride` apart; null where there are none.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
};

struct GuidedStepProblem {
  Rows sample;
  Rows output;
  Rows unconditional;
  Rows noise;
  Rows variance;
  DType sample_type;  // of sample, noise and the result
  DType output_type;  // of output, unconditional and variance
  int64_t rows;
  int64_t size;
  // The first `guided` of every `period` elements of a row are guided.
  int64_t period;
  int64_t guided;
  double guidance_scale;
  double clean_sample;
  double clean_output;
  double clip;
  double step_sample;
  double step_clean;
  double noise_scale;
  double min_log_variance;
  double max_log_variance;
};

// Elements [begin, end) of a row, to next [rows, size].
using GuidedStepKernel = void (*)(const GuidedStepProblem&, int64_t row, int64_t begin, int64_t end, void* next);

void guided_step_scalar(const GuidedStepProblem&, int64_t row, int64_t begin, int64_t end, void* next);
void guided_step_avx2(const GuidedStepProblem&, int64_t row, int64_t begin, int64_t end, void* next);
void guided_step_avx512(const GuidedStepProblem&, int64_t row, int64_t begin, int64_t end, void* next);

void guided_step(const GuidedStepProblem& problem, void* next, const Parallel& parallel);

}  // namespace vqkernels::cpu
