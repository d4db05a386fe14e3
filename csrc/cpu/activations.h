// The activations of feed-forward layers and their derivatives, on lanes.
#pragma once

#include <type_traits>

#include "activation.h"
#include "lanes_math.h"
#include "modulation_kernel.h"

namespace vqkernels::cpu {
namespace {

template <class A>
struct ValueAndDerivative {
  Lanes<A> value;
  Lanes<A> derivative;
};

struct Silu {  // x sigmoid(x)
  template <class A>
  VQKERNELS_LANES_INLINE static Lanes<A> value(const Lanes<A>& x) {
    return x * sigmoid(x);
  }
  template <class A>
  VQKERNELS_LANES_INLINE static ValueAndDerivative<A> both(const Lanes<A>& x) {
    const Sigmoid<A> s = sigmoid_parts(x);
    return {x * s.value, s.value * fma(x, s.complement, broadcast(A{1}))};
  }
};

struct Gelu {  // x times the cumulative normal distribution
  template <class A>
  VQKERNELS_LANES_INLINE static Lanes<A> value(const Lanes<A>& x) {
    return x * normal(x).cumulative;
  }
  template <class A>
  VQKERNELS_LANES_INLINE static ValueAndDerivative<A> both(const Lanes<A>& x) {
    const Normal<A> n = normal(x);
    return {x * n.cumulative, fma(x, n.density, n.cumulative)};
  }
};

// x (1 + tanh(u)) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
  static constexpr double kLinear = 1.5957691216057307;  // 2 sqrt(2 / pi)
  static constexpr double kCubic = 0.07135481627260025;  // 0.044715 times that

  template <class A>
  VQKERNELS_LANES_INLINE static Lanes<A> value(const Lanes<A>& x) {
    const Lanes<A> slope = fma(x * x, broadcast<A>(kCubic), broadcast<A>(kLinear));
    return x * sigmoid(x * slope);
  }
  template <class A>
  VQKERNELS_LANES_INLINE static ValueAndDerivative<A> both(const Lanes<A>& x) {
    // Beyond 32 the derivative is 0 or 1, and the slope of u must not overflow.
    const Lanes<A> bound = broadcast(A{32});
    const Lanes<A> inside = minimum(bound, maximum(-bound, x));
    const Lanes<A> square = inside * inside;
    const Sigmoid<A> s = sigmoid_parts(inside * fma(square, broadcast<A>(kCubic), broadcast<A>(kLinear)));
    const Lanes<A> slope = fma(square, broadcast<A>(3 * kCubic), broadcast<A>(kLinear));
    return {x * s.value, s.value * fma(inside * slope, s.complement, broadcast(A{1}))};
  }
};

// x + bias, or x itself: adding a zero would change the sign of -0.
template <bool kBias, class A, class Part>
VQKERNELS_LANES_INLINE Lanes<A> load_biased(const A* x, const A* bias, int64_t d, Part part) {
  if constexpr (kBias) return load_part(x + d, part) + load_part(bias + d, part);
  return load_part(x + d, part);
}

// Asks for memory ahead of its use. There is so much arithmetic between two loads that few of them are on their way at
// a time otherwise: rows of 18 MB in all took 1.6 times as long.
inline constexpr int64_t kBytesAhead = 2048;

VQKERNELS_LANES_INLINE void will_read(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + kBytesAhead, 0);
}
VQKERNELS_LANES_INLINE void will_write(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + kBytesAhead, 1);
}

// Calls run(arithmetic type, activation, whether there is a bias) with values of the types that a problem says.
template <class Problem, class Run>
inline void with_feed_forward(const Problem& p, const Run& run) {
  const auto with_activation = [&](auto zero, auto has_bias) {
    switch (p.activation) {
      case Activation::silu:
        return run(zero, Silu{}, has_bias);
      case Activation::gelu:
        return run(zero, Gelu{}, has_bias);
      case Activation::gelu_tanh:
        return run(zero, GeluTanh{}, has_bias);
    }
  };
  const auto with_bias = [&](auto zero) {
    if (p.bias) return with_activation(zero, std::true_type{});
    with_activation(zero, std::false_type{});
  };
  if (p.wide) return with_bias(double{});
  with_bias(float{});
}

}  // namespace
}  // namespace vqkernels::cpu
