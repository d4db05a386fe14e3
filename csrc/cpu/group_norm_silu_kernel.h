// The functions of one instruction set, which choose by the type of x.
#pragma once

#include <type_traits>

#include "group_norm_silu_backward.h"
#include "with_types.h"

namespace vqkernels::cpu {
namespace {

template <class Run>
inline void with_type(const GroupNormSiluProblem& p, const Run& run) {
  with_types(p.type, DType::float32,
             [&](auto, auto x, auto) { p.silu ? run(x, std::true_type{}) : run(x, std::false_type{}); });
}

inline void any_moments(const GroupNormSiluProblem& p, int64_t unit, int64_t begin, int64_t end, Moments* moments) {
  with_type(p, [&](auto x, auto) { moments_chunks<decltype(x)>(p, unit, begin, end, moments); });
}

inline void any_normalize(const GroupNormSiluProblem& p, int64_t unit, int64_t begin, int64_t end, const double* mean,
                          const double* rstd, void* y) {
  with_type(p, [&](auto x, auto silu) {
    normalize_chunks<silu.value>(p, unit, begin, end, mean, rstd, static_cast<decltype(x)*>(y));
  });
}

inline void any_sums(const GroupNormSiluProblem& p, int64_t unit, int64_t begin, int64_t end, const void* mean,
                     const void* rstd, const void* grad, void* grad_x, ChannelSums* sums) {
  with_type(p, [&](auto x, auto silu) {
    using T = decltype(x);
    constexpr bool keep = silu.value && sizeof(T) == sizeof(widen(x));
    sums_parts<silu.value>(p, unit, begin, end, mean, rstd, static_cast<const T*>(grad),
                           keep ? static_cast<T*>(grad_x) : nullptr, sums);
  });
}

inline void any_gradient(const GroupNormSiluProblem& p, int64_t unit, int64_t begin, int64_t end, const void* mean,
                         const void* rstd, const void* grad, const GroupGradient* gradients, void* grad_x) {
  with_type(p, [&](auto x, auto silu) {
    using T = decltype(x);
    constexpr bool kept = silu.value && sizeof(T) == sizeof(widen(x));
    gradient_parts<silu.value, kept>(p, unit, begin, end, mean, rstd, static_cast<const T*>(grad), gradients,
                                     static_cast<T*>(grad_x));
  });
}

inline GroupNormSiluKernels group_norm_silu_kernels() { return {any_moments, any_normalize, any_sums, any_gradient}; }

}  // namespace
}  // namespace vqkernels::cpu
