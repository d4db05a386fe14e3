// One step of a sampler (guided_step.h), written once for all instruction sets.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "guided_step.h"
#include "lanes.h"
#include "lanes_math.h"
#include "with_types.h"

namespace vqkernels::cpu {
namespace {

// Where guided and unguided elements alternate more often than this, they are told apart lane by lane.
inline constexpr int64_t kLongPeriod = 1024;

template <class T>
inline const T* row_of(const Rows& rows, int64_t row) {
  return rows.data ? static_cast<const T*>(rows.data) + row * rows.stride : nullptr;
}

// A row of T with predictions in U. An operand that there is none of is null.
template <class T, class U>
struct StepRow {
  using A = decltype(widen(T{}));

  StepRow(const GuidedStepProblem& p, int64_t row, void* next)
      : sample(row_of<T>(p.sample, row)),
        output(row_of<U>(p.output, row)),
        unconditional(row_of<U>(p.unconditional, row)),
        noise(row_of<T>(p.noise, row)),
        variance(row_of<U>(p.variance, row)),
        next(static_cast<T*>(next) + row * p.size),
        guidance_scale(lanes(p.guidance_scale)),
        clean_sample(lanes(p.clean_sample)),
        clean_output(lanes(p.clean_output)),
        clip(lanes(p.clip)),
        step_sample(lanes(p.step_sample)),
        step_clean(lanes(p.step_clean)),
        noise_scale(lanes(p.noise_scale)),
        half_log_slope(lanes((p.max_log_variance - p.min_log_variance) / 4)),
        half_log_middle(lanes((p.max_log_variance + p.min_log_variance) / 4)) {}

  static Lanes<A> lanes(double x) { return broadcast<A>(static_cast<A>(x)); }

  // Steps the lanes at i: all, or `left` where that is less. guided: 1 or 0 a lane, null: all are alike.
  VQKERNELS_LANES_INLINE void apply(int64_t i, int64_t left, bool any_guided, const A* guided) const {
    const bool whole = left >= Lanes<A>::count;
    const auto read = [&](const auto* p) { return whole ? load(p + i) : load(p + i, left); };
    const Lanes<A> x = read(sample);
    Lanes<A> o = read(output);
    if (any_guided) {
      const Lanes<A> u = read(unconditional);
      const Lanes<A> mixed = fma(guidance_scale, o - u, u);
      o = guided ? select<A>(load(guided) != broadcast<A>(0), mixed, o) : mixed;
    }
    // Comparisons in this order keep a NaN.
    const Lanes<A> clean = minimum(clip, maximum(-clip, fma(clean_output, o, clean_sample * x)));
    Lanes<A> y = fma(step_clean, clean, step_sample * x);
    if (noise) {
      const Lanes<A> s = variance ? exp(fma(read(variance), half_log_slope, half_log_middle)) : noise_scale;
      y = fma(s, read(noise), y);
    }
    whole ? store(next + i, y) : store(next + i, y, left);
  }

  const T* sample;
  const U* output;
  const U* unconditional;
  const T* noise;
  const U* variance;
  T* next;
  Lanes<A> guidance_scale;
  Lanes<A> clean_sample;
  Lanes<A> clean_output;
  Lanes<A> clip;
  Lanes<A> step_sample;
  Lanes<A> step_clean;
  Lanes<A> noise_scale;
  Lanes<A> half_log_slope;
  Lanes<A> half_log_middle;
};

template <class T, class U>
inline void step_row(const GuidedStepProblem& p, int64_t row, int64_t begin, int64_t end, void* next) {
  using A = decltype(widen(T{}));
  constexpr int64_t count = Lanes<A>::count;
  const StepRow<T, U> step(p, row, next);
  const bool guides = p.unconditional.data != nullptr;
  if (!guides || p.guided == p.period || p.period >= kLongPeriod) {
    for (int64_t i = begin; i < end;) {
      // A stretch of elements that are all guided or all not.
      int64_t stretch = end;
      bool guided = guides;
      if (guides && p.guided != p.period) {
        const int64_t phase = i % p.period;
        guided = phase < p.guided;
        stretch = std::min(end, i - phase + (guided ? p.guided : p.period));
      }
      for (; i < stretch; i += count) step.apply(i, stretch - i, guided, nullptr);
      i = stretch;
    }
    return;
  }
  Buffer<A> guided(p.period + count);
  for (int64_t i = 0; i < p.period + count; ++i) guided[i] = i % p.period < p.guided ? 1 : 0;
  const int64_t advance = count % p.period;
  int64_t phase = begin % p.period;
  for (int64_t i = begin; i < end; i += count) {
    step.apply(i, end - i, true, guided.get() + phase);
    phase += advance;
    if (phase >= p.period) phase -= p.period;
  }
}

inline void any_step_row(const GuidedStepProblem& p, int64_t row, int64_t begin, int64_t end, void* next) {
  with_types(p.sample_type, p.output_type, [&](auto, auto sample, auto output) {
    step_row<decltype(sample), decltype(output)>(p, row, begin, end, next);
  });
}

}  // namespace
}  // namespace vqkernels::cpu
