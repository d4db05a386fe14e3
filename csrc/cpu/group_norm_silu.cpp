#include "group_norm_silu.h"

#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "capability.h"

namespace vqkernels::cpu {
namespace {

GroupNormSiluKernels choose_kernels() {
  switch (capability()) {
#ifdef VQKERNELS_X86
    case Capability::avx512:
      return group_norm_silu_avx512();
    case Capability::avx2:
      return group_norm_silu_avx2();
#endif
    default:
      return group_norm_silu_scalar();
  }
}

// Calls run(unit, inside) for every unit; what run hands to inside(count, body) is a part of the unit's work. Threads
// share units, so that a unit stays in their caches, or where there are fewer units than threads the work inside.
template <class Run>
void over_units(int64_t units, const Parallel& parallel, const Run& run) {
  if (units >= parallel.threads) {
    const auto alone = [](int64_t count, const Body& body) { body(0, count); };
    parallel.run(units, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) run(unit, alone);
    });
  } else {
    for (int64_t unit = 0; unit < units; ++unit) run(unit, parallel.run);
  }
}

// The moments of the chunks of one group, `stride` apart, put together in ascending order.
Moments join_chunks(const GroupNormSiluProblem& p, const Moments* moments, int64_t stride) {
  const int64_t chunk_size = p.channels_last ? kBlockRows * p.group_channels() : kMomentElements;
  const auto size_of = [&](int64_t chunk) {
    return static_cast<double>(std::min(chunk_size, p.group_size() - chunk * chunk_size));
  };
  const int64_t chunks = p.chunks();
  Moments all = {0, 0};
  for (int64_t i = 0; i < chunks; ++i) all.mean += moments[i * stride].mean * (size_of(i) / p.group_size());
  for (int64_t i = 0; i < chunks; ++i) {
    const double d = moments[i * stride].mean - all.mean;
    all.squares += moments[i * stride].squares + d * d * size_of(i);
  }
  return all;
}

template <class A>
void save(const double* from, int64_t n, void* to) {
  std::transform(from, from + n, static_cast<A*>(to), [](double x) { return static_cast<A>(x); });
}

void save(const GroupNormSiluProblem& p, const double* from, int64_t n, void* to) {
  p.type == DType::float64 ? save<double>(from, n, to) : save<float>(from, n, to);
}

double value_at(const GroupNormSiluProblem& p, const void* values, int64_t i) {
  return p.type == DType::float64 ? static_cast<const double*>(values)[i] : static_cast<const float*>(values)[i];
}

// To the accumulation type.
double rounded(const GroupNormSiluProblem& p, double x) { return p.type == DType::float64 ? x : static_cast<float>(x); }

}  // namespace

void group_norm_silu(const GroupNormSiluProblem& p, void* y, void* mean, void* rstd, const Parallel& parallel) {
  const GroupNormSiluKernels kernels = choose_kernels();
  const int64_t groups = p.unit_groups(), chunks = p.chunks();
  Buffer<double> means(p.batch * p.groups), rstds(p.batch * p.groups);
  over_units(p.units(), parallel, [&](int64_t unit, const auto& inside) {
    Buffer<Moments> moments(chunks * groups);
    inside(chunks, [&](int64_t begin, int64_t end) { kernels.moments(p, unit, begin, end, moments.get()); });
    double* const unit_mean = means.get() + unit * groups;
    double* const unit_rstd = rstds.get() + unit * groups;
    for (int64_t group = 0; group < groups; ++group) {
      const Moments all = join_chunks(p, moments.get() + group, groups);
      unit_mean[group] = all.mean;
      unit_rstd[group] = 1 / std::sqrt(all.squares / p.group_size() + p.eps);
    }
    inside(chunks,
           [&](int64_t begin, int64_t end) { kernels.normalize(p, unit, begin, end, unit_mean, unit_rstd, y); });
  });
  save(p, means.get(), p.batch * p.groups, mean);
  save(p, rstds.get(), p.batch * p.groups, rstd);
}

void group_norm_silu_backward(const GroupNormSiluProblem& p, const void* grad, const void* mean, const void* rstd,
                              void* grad_x, void* grad_weight, void* grad_bias, const Parallel& parallel) {
  const GroupNormSiluKernels kernels = choose_kernels();
  const int64_t groups = p.unit_groups(), parts = p.parts(), group_channels = p.group_channels();
  Buffer<ChannelSums> sums(p.batch * p.channels);
  over_units(p.units(), parallel, [&](int64_t unit, const auto& inside) {
    ChannelSums* const unit_sums = sums.get() + unit * groups * group_channels;
    if (p.channels_last) {
      Buffer<ChannelSums> partial(parts * p.channels);
      inside(parts, [&](int64_t begin, int64_t end) {
        kernels.sums(p, unit, begin, end, mean, rstd, grad, grad_x, partial.get());
      });
      for (int64_t c = 0; c < p.channels; ++c) {
        unit_sums[c] = {0, 0};
        for (int64_t part = 0; part < parts; ++part) {
          unit_sums[c].gradient += partial[part * p.channels + c].gradient;
          unit_sums[c].product += partial[part * p.channels + c].product;
        }
      }
    } else {
      inside(parts, [&](int64_t begin, int64_t end) {
        kernels.sums(p, unit, begin, end, mean, rstd, grad, grad_x, unit_sums);
      });
    }
    if (!grad_x) return;
    Buffer<GroupGradient> gradients(groups);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t group_in_all = unit * groups + group;
      const int64_t first_channel = group_in_all % p.groups * group_channels;
      const double r = value_at(p, rstd, group_in_all);
      ChannelSums total = {0, 0};
      for (int64_t i = 0; i < group_channels; ++i) {
        const double slope = p.weight ? rounded(p, r * value_at(p, p.weight, first_channel + i)) : r;
        total.gradient += slope * unit_sums[group * group_channels + i].gradient;
        total.product += slope * unit_sums[group * group_channels + i].product;
      }
      gradients[group] = {total.gradient / p.group_size(), r * r * total.product / p.group_size()};
    }
    inside(parts, [&](int64_t begin, int64_t end) {
      kernels.gradient(p, unit, begin, end, mean, rstd, grad, gradients.get(), grad_x);
    });
  });
  Buffer<double> of_weight(p.channels), of_bias(p.channels);
  for (int64_t c = 0; c < p.channels; ++c) {
    of_weight[c] = of_bias[c] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const ChannelSums& s = sums[b * p.channels + c];
      of_weight[c] += value_at(p, rstd, b * p.groups + c / group_channels) * s.product;
      of_bias[c] += s.gradient;
    }
  }
  save(p, of_weight.get(), p.channels, grad_weight);
  save(p, of_bias.get(), p.channels, grad_bias);
}

}  // namespace vqkernels::cpu
