// The work of forward on the chunks of a unit (group_norm_silu.h), written once for all instruction sets.
#pragma once

#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "group_norm_silu.h"
#include "lanes.h"
#include "lanes_math.h"

namespace vqkernels::cpu {
namespace {

// Groups up to this size are fetched ahead.
inline constexpr int64_t kPrefetchElements = 1 << 16;

// Vectors of channels whose sums are kept in registers at a time.
inline constexpr int64_t kChannelVectors = 4;

// The first n lanes, then zeros.
template <class A>
VQKERNELS_LANES_INLINE Lanes<A> first_lanes(const Lanes<A>& x, int64_t n) {
  A lanes[Lanes<A>::count];
  store(lanes, x);
  return load(static_cast<const A*>(lanes), n);
}

template <class A>
VQKERNELS_LANES_INLINE bool any(const Lanes<A>& mask) {
  A lanes[Lanes<A>::count];
  store(lanes, mask);
  A all = 0;
  for (const A lane : lanes) all |= lane;
  return all != 0;
}

// Of n numbers the mean of x - center, whose sum could overflow, and the sum of (x - center)^2.
template <class A>
struct Centered {
  A center;
  A mean;
  A squares;

  // Whether so much of the squares comes from a center beside the mean that what is left when that is taken off would
  // be inaccurate.
  bool off_center(int64_t n) const { return mean * mean * n > squares * A(0.875); }

  Moments moments(int64_t n) const {
    const double rest = mean;
    const double exact = squares - rest * rest * n;
    return {center + rest, exact < 0 ? 0 : exact};
  }
};

template <class T>
inline Centered<decltype(widen(T{}))> sums_about(const T* x, int64_t n, decltype(widen(T{})) center) {
  using A = decltype(widen(T{}));
  constexpr int64_t count = Lanes<A>::count;
  const Lanes<A> zero = broadcast<A>(0), middle = broadcast<A>(center), share = broadcast<A>(A{1} / n);
  Lanes<A> means[4] = {zero, zero, zero, zero}, squares[4] = {zero, zero, zero, zero};
  const auto add = [&](int j, const Lanes<A>& d) {
    means[j] = fma(d, share, means[j]);
    squares[j] = fma(d, d, squares[j]);
  };
  int64_t i = 0;
  for (; i + 4 * count <= n; i += 4 * count) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) add(j, load(x + i + j * count) - middle);
  }
  for (; i + count <= n; i += count) add(0, load(x + i) - middle);
  if (i < n) add(1, first_lanes(load(x + i, n - i) - middle, n - i));
  const auto total = [](const Lanes<A>* parts) { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])); };
  return {center, total(means), total(squares)};
}

// Moments in one pass about the mean of the first few numbers, and a second one where that is far from the mean of all.
template <class T>
inline Moments moments_of(const T* x, int64_t n) {
  using A = decltype(widen(T{}));
  constexpr int64_t count = Lanes<A>::count;
  const int64_t first = std::min(n, count);
  const Lanes<A> share = broadcast<A>(A{1} / first);
  Centered<A> sums = sums_about(x, n, sum((first < count ? load(x, first) : load(x)) * share));
  if (sums.off_center(n)) sums = sums_about(x, n, sums.center + sums.mean);
  return sums.moments(n);
}

// The same of each of V vectors of adjacent channels over some rows, to moments. With `partial` only n channels of one
// vector are there.
template <int64_t V, bool partial, class T>
inline void channel_moments(const T* x, int64_t rows, int64_t channels, int64_t n, Moments* moments) {
  using A = decltype(widen(T{}));
  constexpr int64_t count = Lanes<A>::count;
  const auto read = [&](int64_t row, int64_t v) {
    const T* p = x + row * channels + v * count;
    if constexpr (partial) return load(p, n);
    return load(p);
  };
  const Lanes<A> share = broadcast<A>(A{1} / rows);
  Lanes<A> center[V], means[V], squares[V];
  const auto add_rows = [&] {
    for (int64_t v = 0; v < V; ++v) means[v] = squares[v] = broadcast<A>(0);
    for (int64_t row = 0; row < rows; ++row) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < V; ++v) {
        const Lanes<A> d = read(row, v) - center[v];
        means[v] = fma(d, share, means[v]);
        squares[v] = fma(d, d, squares[v]);
      }
    }
  };
  const int64_t first = std::min<int64_t>(rows, 4);
  const Lanes<A> first_share = broadcast<A>(A{1} / first);
  for (int64_t v = 0; v < V; ++v) {
    center[v] = broadcast<A>(0);
    for (int64_t row = 0; row < first; ++row) center[v] = fma(read(row, v), first_share, center[v]);
  }
  add_rows();
  const Lanes<A> count_rows = broadcast<A>(static_cast<A>(rows)), most = broadcast<A>(A(0.875));
  bool again = false;
  for (int64_t v = 0; v < V; ++v) again = again || any(means[v] * means[v] * count_rows > squares[v] * most);
  if (again) {
    for (int64_t v = 0; v < V; ++v) center[v] = center[v] + means[v];
    add_rows();
  }
  A m[V * count], s[V * count], q[V * count];
  for (int64_t v = 0; v < V; ++v) {
    store(m + v * count, center[v]);
    store(s + v * count, means[v]);
    store(q + v * count, squares[v]);
  }
  for (int64_t c = 0; c < (partial ? n : V * count); ++c) {
    moments[c] = Centered<A>{m[c], s[c], q[c]}.moments(rows);
  }
}

// Moments of `parts` parts of n elements each, put together.
inline Moments joined(const Moments* moments, int64_t parts, int64_t n) {
  double mean = 0, squares = 0, between = 0;
  for (int64_t i = 0; i < parts; ++i) mean += moments[i].mean / parts;
  for (int64_t i = 0; i < parts; ++i) {
    const double d = moments[i].mean - mean;
    squares += moments[i].squares;
    between += d * d;
  }
  return {mean, squares + between * n};
}

template <class T>
inline void moments_chunks(const GroupNormSiluProblem& p, int64_t unit, int64_t begin, int64_t end, Moments* moments) {
  constexpr int64_t count = Lanes<decltype(widen(T{}))>::count;
  const T* x = static_cast<const T*>(p.x);
  if (!p.channels_last) {
    const int64_t size = p.group_size();
    x += unit * size;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kMomentElements;
      moments[chunk] = moments_of(x + first, std::min(kMomentElements, size - first));
    }
    return;
  }
  Buffer<Moments> of_channels(p.channels);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kBlockRows, rows = std::min(kBlockRows, p.positions - first);
    const T* block = x + (unit * p.positions + first) * p.channels;
    int64_t c = 0;
    for (; c + kChannelVectors * count <= p.channels; c += kChannelVectors * count) {
      channel_moments<kChannelVectors, false>(block + c, rows, p.channels, p.channels - c, of_channels.get() + c);
    }
    for (; c + count <= p.channels; c += count) {
      channel_moments<1, false>(block + c, rows, p.channels, p.channels - c, of_channels.get() + c);
    }
    if (c < p.channels) {
      channel_moments<1, true>(block + c, rows, p.channels, p.channels - c, of_channels.get() + c);
    }
    for (int64_t group = 0; group < p.groups; ++group) {
      moments[chunk * p.groups + group] =
          joined(of_channels.get() + group * p.group_channels(), p.group_channels(), rows);
    }
  }
}

template <class A>
VQKERNELS_LANES_INLINE Lanes<A> silu(const Lanes<A>& h) {
  return h * sigmoid(h);
}

// The derivative of SiLU.
template <class A>
VQKERNELS_LANES_INLINE Lanes<A> silu_slope(const Lanes<A>& h) {
  const Sigmoid<A> s = sigmoid_parts(h);
  return fma(h * s.value, s.complement, s.value);
}

// h = (x - mean) * slope + shift of a channel.
template <class A>
struct ChannelMap {
  A mean;
  A slope;
  A shift;
};

// What the mean loses when it is rounded goes to the shift.
template <class A>
inline ChannelMap<A> channel_map(const GroupNormSiluProblem& p, int64_t channel, double mean, double rstd) {
  const A* weight = static_cast<const A*>(p.weight);
  const A* bias = static_cast<const A*>(p.bias);
  const A rounded = static_cast<A>(mean);
  const double slope = weight ? rstd * weight[channel] : rstd;
  const double shift = (rounded - mean) * slope + (bias ? bias[channel] : A{0});
  return {rounded, static_cast<A>(slope), static_cast<A>(shift)};
}

// `ahead`: how far from here lies what is read next, while this is computed.
template <bool with_silu, class T>
inline void normalize_channel(const T* x, int64_t n, const ChannelMap<decltype(widen(T{}))>& map, int64_t ahead, T* y) {
  using A = decltype(widen(T{}));
  constexpr int64_t count = Lanes<A>::count;
  const Lanes<A> mean = broadcast<A>(map.mean), slope = broadcast<A>(map.slope), shift = broadcast<A>(map.shift);
  const auto apply = [&](const Lanes<A>& in) {
    const Lanes<A> h = fma(in - mean, slope, shift);
    if constexpr (with_silu) return silu(h);
    return h;
  };
  int64_t i = 0;
  for (; i + 2 * count <= n; i += 2 * count) {
    if constexpr (with_silu) {
      __builtin_prefetch(x + ahead + i, 0, 2);
      __builtin_prefetch(x + ahead + i + count, 0, 2);
    }
    const Lanes<A> first = apply(load(x + i)), second = apply(load(x + i + count));
    store(y + i, first);
    store(y + i + count, second);
  }
  for (; i + count <= n; i += count) store(y + i, apply(load(x + i)));
  if (i < n) store(y + i, apply(load(x + i, n - i)), n - i);
}

// Channel maps as three rows, padded to whole vectors: what work along the channels reads.
template <class A>
class ChannelMaps {
 public:
  ChannelMaps(const GroupNormSiluProblem& p, const double* mean, const double* rstd)
      : stride_((p.channels + Lanes<A>::count - 1) / Lanes<A>::count * Lanes<A>::count), values_(3 * stride_) {
    std::fill_n(values_.get(), 3 * stride_, A{0});
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t group = c / p.group_channels();
      const ChannelMap<A> map = channel_map<A>(p, c, mean[group], rstd[group]);
      values_[c] = map.mean;
      values_[stride_ + c] = map.slope;
      values_[2 * stride_ + c] = map.shift;
    }
  }
  const A* mean() const { return values_.get(); }
  const A* slope() const { return values_.get() + stride_; }
  const A* shift() const { return values_.get() + 2 * stride_; }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_;
  Buffer<A> values_;
};

template <bool with_silu, class T>
inline void normalize_chunks(const GroupNormSiluProblem& p, int64_t unit, int64_t begin, int64_t end,
                             const double* mean, const double* rstd, T* y) {
  using A = decltype(widen(T{}));
  constexpr int64_t count = Lanes<A>::count;
  const T* x = static_cast<const T*>(p.x);
  if (!p.channels_last) {
    const int64_t size = p.group_size(), first_channel = unit % p.groups * p.group_channels();
    x += unit * size;
    y += unit * size;
    const int64_t last = std::min(end * kMomentElements, size);
    const int64_t ahead = unit + 1 < p.units() && size <= kPrefetchElements ? size : 0;
    for (int64_t i = begin * kMomentElements; i < last;) {
      const int64_t channel = i / p.positions, next = std::min(last, (channel + 1) * p.positions);
      const ChannelMap<A> map = channel_map<A>(p, first_channel + channel, *mean, *rstd);
      normalize_channel<with_silu>(x + i, next - i, map, ahead, y + i);
      i = next;
    }
    return;
  }
  const ChannelMaps<A> maps(p, mean, rstd);
  const int64_t last = std::min(end * kBlockRows, p.positions);
  for (int64_t row = begin * kBlockRows; row < last; ++row) {
    const T* in = x + (unit * p.positions + row) * p.channels;
    T* out = y + (unit * p.positions + row) * p.channels;
    const auto apply = [&](const Lanes<A>& value, int64_t c) {
      const Lanes<A> h = fma(value - load(maps.mean() + c), load(maps.slope() + c), load(maps.shift() + c));
      if constexpr (with_silu) return silu(h);
      return h;
    };
    int64_t c = 0;
    for (; c + count <= p.channels; c += count) store(out + c, apply(load(in + c), c));
    if (c < p.channels) store(out + c, apply(load(in + c, p.channels - c), c), p.channels - c);
  }
}

}  // namespace
}  // namespace vqkernels::cpu
