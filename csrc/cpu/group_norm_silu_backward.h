// The work of backward on the parts of a unit (group_norm_silu.h), written once for all instruction sets.
#pragma once

#include "group_norm_silu_forward.h"

namespace vqkernels::cpu {
namespace {

// g = dy * silu'(h), and g summed up alone and with x - mean. Where `kept` is not null, g is left there.
template <class A>
struct GradientSums {
  Lanes<A> gradient;
  Lanes<A> product;

  template <bool with_silu>
  VQKERNELS_LANES_INLINE Lanes<A> add(const Lanes<A>& dy, const Lanes<A>& d, const Lanes<A>& slope,
                                      const Lanes<A>& shift) {
    Lanes<A> g = dy;
    if constexpr (with_silu) g = dy * silu_slope(fma(d, slope, shift));
    gradient = gradient + g;
    product = fma(g, d, product);
    return g;
  }
};

template <bool with_silu, class T>
inline ChannelSums channel_sums(const T* x, const T* grad, int64_t n, const ChannelMap<decltype(widen(T{}))>& map,
                                T* kept) {
  using A = decltype(widen(T{}));
  constexpr int64_t count = Lanes<A>::count;
  const Lanes<A> mean = broadcast<A>(map.mean), slope = broadcast<A>(map.slope), shift = broadcast<A>(map.shift);
  ChannelSums total = {0, 0};
  for (int64_t first = 0; first < n; first += kMomentElements) {
    const int64_t last = std::min(n, first + kMomentElements);
    GradientSums<A> sums[2] = {{broadcast<A>(0), broadcast<A>(0)}, {broadcast<A>(0), broadcast<A>(0)}};
    int64_t i = first;
    for (; i + 2 * count <= last; i += 2 * count) {
      for (int j = 0; j < 2; ++j) {
        const int64_t at = i + j * count;
        const Lanes<A> g = sums[j].template add<with_silu>(load(grad + at), load(x + at) - mean, slope, shift);
        if (kept) store(kept + at, g);
      }
    }
    for (; i < last; i += count) {
      const int64_t left = std::min(count, last - i);
      const bool whole = left == count;
      const Lanes<A> dy = whole ? load(grad + i) : load(grad + i, left);
      const Lanes<A> d = (whole ? load(x + i) : load(x + i, left)) - mean;
      const Lanes<A> g = sums[0].template add<with_silu>(dy, d, slope, shift);
      if (kept) whole ? store(kept + i, g) : store(kept + i, g, left);
    }
    total.gradient += sum(sums[0].gradient + sums[1].gradient);
    total.product += sum(sums[0].product + sums[1].product);
  }
  return total;
}

// mean and rstd of the groups of a unit as they were saved.
template <class A>
inline void saved_statistics(const GroupNormSiluProblem& p, int64_t unit, const void* mean, const void* rstd,
                             double* means, double* rstds) {
  const int64_t groups = p.unit_groups();
  std::copy_n(static_cast<const A*>(mean) + unit * groups, groups, means);
  std::copy_n(static_cast<const A*>(rstd) + unit * groups, groups, rstds);
}

template <bool with_silu, class T>
inline void sums_parts(const GroupNormSiluProblem& p, int64_t unit, int64_t begin, int64_t end, const void* mean,
                       const void* rstd, const T* grad, T* kept, ChannelSums* sums) {
  using A = decltype(widen(T{}));
  constexpr int64_t count = Lanes<A>::count;
  const T* x = static_cast<const T*>(p.x);
  Buffer<double> means(p.unit_groups()), rstds(p.unit_groups());
  saved_statistics<A>(p, unit, mean, rstd, means.get(), rstds.get());
  if (!p.channels_last) {
    const int64_t first_channel = unit % p.groups * p.group_channels();
    for (int64_t part = begin; part < end; ++part) {
      const int64_t offset = unit * p.group_size() + part * p.positions;
      const ChannelMap<A> map = channel_map<A>(p, first_channel + part, means[0], rstds[0]);
      sums[part] = channel_sums<with_silu>(x + offset, grad + offset, p.positions, map, kept ? kept + offset : nullptr);
    }
    return;
  }
  const ChannelMaps<A> maps(p, means.get(), rstds.get());
  Buffer<A> block_sums(2 * maps.stride());
  A* const gradient = block_sums.get();
  A* const product = gradient + maps.stride();
  for (int64_t part = begin; part < end; ++part) {
    ChannelSums* out = sums + part * p.channels;
    std::fill_n(out, p.channels, ChannelSums{0, 0});
    const int64_t last = std::min(p.positions, (part + 1) * p.part_rows());
    for (int64_t block = part * p.part_rows(); block < last; block += kBlockRows) {
      std::fill_n(gradient, 2 * maps.stride(), A{0});
      for (int64_t row = block; row < std::min(last, block + kBlockRows); ++row) {
        const int64_t offset = (unit * p.positions + row) * p.channels;
        for (int64_t c = 0; c < p.channels; c += count) {
          const int64_t left = std::min(count, p.channels - c);
          const bool whole = left == count;
          const Lanes<A> dy = whole ? load(grad + offset + c) : load(grad + offset + c, left);
          const Lanes<A> in = whole ? load(x + offset + c) : load(x + offset + c, left);
          GradientSums<A> s = {load(gradient + c), load(product + c)};
          const Lanes<A> g =
              s.template add<with_silu>(dy, in - load(maps.mean() + c), load(maps.slope() + c), load(maps.shift() + c));
          store(gradient + c, s.gradient);
          store(product + c, s.product);
          if (kept) whole ? store(kept + offset + c, g) : store(kept + offset + c, g, left);
        }
      }
      for (int64_t c = 0; c < p.channels; ++c) {
        out[c].gradient += gradient[c];
        out[c].product += product[c];
      }
    }
  }
}

// dx = slope g - shift' - slope' (x - mean), with slope', shift' of the group. The product is rounded as it is where
// the shift is summed up, so that a group of one element has no gradient to the last bit.
template <class A>
VQKERNELS_LANES_INLINE Lanes<A> input_gradient(const Lanes<A>& g, const Lanes<A>& d, const Lanes<A>& slope,
                                               const Lanes<A>& group_slope, const Lanes<A>& group_shift) {
  return fma(-group_slope, d, g * slope - group_shift);
}

// grad_x holds g before where `kept` is set.
template <bool with_silu, bool kept, class T>
inline void gradient_parts(const GroupNormSiluProblem& p, int64_t unit, int64_t begin, int64_t end, const void* mean,
                           const void* rstd, const T* grad, const GroupGradient* gradients, T* grad_x) {
  using A = decltype(widen(T{}));
  constexpr int64_t count = Lanes<A>::count;
  const T* x = static_cast<const T*>(p.x);
  const T* from = kept ? grad_x : grad;
  Buffer<double> means(p.unit_groups()), rstds(p.unit_groups());
  saved_statistics<A>(p, unit, mean, rstd, means.get(), rstds.get());
  const auto of_lanes = [](Lanes<A> g, const Lanes<A>& d, const Lanes<A>& slope, const Lanes<A>& shift,
                           const Lanes<A>& group_slope, const Lanes<A>& group_shift) {
    if constexpr (with_silu && !kept) g = g * silu_slope(fma(d, slope, shift));
    return input_gradient(g, d, slope, group_slope, group_shift);
  };
  if (!p.channels_last) {
    const Lanes<A> group_slope = broadcast<A>(static_cast<A>(gradients->slope));
    const Lanes<A> group_shift = broadcast<A>(static_cast<A>(gradients->shift));
    for (int64_t part = begin; part < end; ++part) {
      const int64_t offset = unit * p.group_size() + part * p.positions;
      const int64_t channel = unit % p.groups * p.group_channels() + part;
      const ChannelMap<A> map = channel_map<A>(p, channel, means[0], rstds[0]);
      const Lanes<A> center = broadcast<A>(map.mean), slope = broadcast<A>(map.slope), shift = broadcast<A>(map.shift);
      int64_t i = offset;
      const int64_t last = offset + p.positions;
      for (; i + count <= last; i += count) {
        store(grad_x + i, of_lanes(load(from + i), load(x + i) - center, slope, shift, group_slope, group_shift));
      }
      if (i < last) {
        const int64_t left = last - i;
        const Lanes<A> d = load(x + i, left) - center;
        store(grad_x + i, of_lanes(load(from + i, left), d, slope, shift, group_slope, group_shift), left);
      }
    }
    return;
  }
  const ChannelMaps<A> maps(p, means.get(), rstds.get());
  Buffer<A> of_groups(2 * maps.stride());
  std::fill_n(of_groups.get(), 2 * maps.stride(), A{0});
  A* const group_slope = of_groups.get();
  A* const group_shift = group_slope + maps.stride();
  for (int64_t c = 0; c < p.channels; ++c) {
    group_slope[c] = static_cast<A>(gradients[c / p.group_channels()].slope);
    group_shift[c] = static_cast<A>(gradients[c / p.group_channels()].shift);
  }
  const int64_t last = std::min(p.positions, end * p.part_rows());
  for (int64_t row = begin * p.part_rows(); row < last; ++row) {
    const int64_t offset = (unit * p.positions + row) * p.channels;
    for (int64_t c = 0; c < p.channels; c += count) {
      const int64_t left = std::min(count, p.channels - c);
      const bool whole = left == count;
      const Lanes<A> g = whole ? load(from + offset + c) : load(from + offset + c, left);
      const Lanes<A> in = whole ? load(x + offset + c) : load(x + offset + c, left);
      const Lanes<A> dx = of_lanes(g, in - load(maps.mean() + c), load(maps.slope() + c), load(maps.shift() + c),
                                   load(group_slope + c), load(group_shift + c));
      whole ? store(grad_x + offset + c, dx) : store(grad_x + offset + c, dx, left);
    }
  }
}

}  // namespace
}  // namespace vqkernels::cpu
