// Transcendental functions of lanes. In float each is a fixed sequence of operations, so that every instruction set has
// the same result to the last bit; in double they are the C library's, lane by lane.
//
// Float polynomials are minimax in the relative error of the function (Remez exchange in 40 digits), then rounded to
// float; degree, interval and error stand beside them. Largest errors of results, found on every 31st of all floats, in
// units in the last place: exp 0.9, sigmoid 2.4 and its complement 2.8, normal density 2.7 and cumulative 3.9.
#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace vqkernels::cpu {
namespace {

template <class Function>
VQKERNELS_LANES_INLINE Lanes<double> each_lane(const Lanes<double>& x, const Function& f) {
  double lanes[Lanes<double>::count];
  store(lanes, x);
  for (double& lane : lanes) lane = f(lane);
  return load(lanes);
}

inline constexpr float kIntegerHome = 0x1.8p+23f + 127;

// e^x 2^shift for x in [-104, 89], with home = kIntegerHome + shift. The shift keeps the power of two a normal number.
VQKERNELS_LANES_INLINE Lanes<float> shifted_exp(const Lanes<float>& x, const Lanes<float>& home) {
  // Adding 1.5 * 2^23 to x / ln 2 leaves the nearest integer n in the low bits of the sum, there with the exponent's
  // bias and the shift.
  const Lanes<float> sum = fma(x, broadcast(0x1.715476p+0f), home);
  const Lanes<float> n = sum - home;
  // ln 2 in two parts: the product of n and the first 15 bits is exact.
  Lanes<float> r = fma(n, broadcast(-0x1.62e4p-1f), x);
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  // e^r = 1 + r + r^2 q(r), q of degree 4, |r| <= ln(2) / 2: relative error 3.1e-9.
  Lanes<float> e = broadcast(0x1.6a2436p-10f);
  e = fma(e, r, broadcast(0x1.1239e2p-7f));
  e = fma(e, r, broadcast(0x1.5558f2p-5f));
  e = fma(e, r, broadcast(0x1.555492p-3f));
  e = fma(e, r, broadcast(0x1.fffffcp-2f));
  e = fma(e, r, broadcast(1.0f));
  e = fma(e, r, broadcast(1.0f));
  return e * from_bits<float>(shift_left(to_bits(sum), 23));
}

VQKERNELS_LANES_INLINE Lanes<float> exp(const Lanes<float>& x) {
  const Lanes<float> low = broadcast(-104.0f), high = broadcast(89.0f);  // e^low is rounded to 0, e^high to Inf
  const Lanes<float> inside = minimum(high, maximum(low, x));
  const IntegerLanes<float> positive = inside > broadcast(0.0f);
  // A subnormal result is rounded where the shift is undone, and only there.
  return shifted_exp(inside, select<float>(positive, broadcast(kIntegerHome - 2), broadcast(kIntegerHome + 64))) *
         select<float>(positive, broadcast(0x1p+2f), broadcast(0x1p-64f));
}
VQKERNELS_LANES_INLINE Lanes<double> exp(const Lanes<double>& x) {
  return each_lane(x, [](double lane) { return std::exp(lane); });
}

// e^x for x that is not positive, in units of 1 / kExpUnit.
template <class A>
inline constexpr A kExpUnit = A{1};
template <>
inline constexpr float kExpUnit<float> = 0x1p+64f;

VQKERNELS_LANES_INLINE Lanes<float> exp_down(const Lanes<float>& x) {
  return shifted_exp(maximum(broadcast(-104.0f), x), broadcast(kIntegerHome + 64));
}
VQKERNELS_LANES_INLINE Lanes<double> exp_down(const Lanes<double>& x) { return exp(x); }

// Both parts keep their relative accuracy where the other is 1.
template <class A>
struct Sigmoid {
  Lanes<A> value;       // 1 / (1 + e^-x)
  Lanes<A> complement;  // 1 / (1 + e^x)
};

template <class A>
VQKERNELS_LANES_INLINE Sigmoid<A> sigmoid_parts(const Lanes<A>& x) {
  const Lanes<A> one = broadcast(kExpUnit<A>);
  const Lanes<A> e = exp_down(-absolute(x));
  const Lanes<A> per = broadcast(A{1}) / (one + e), large = one * per, small = e * per;
  const IntegerLanes<A> negative = x < broadcast(A{0});
  return {select<A>(negative, small, large), select<A>(negative, large, small)};
}

template <class A>
VQKERNELS_LANES_INLINE Lanes<A> sigmoid(const Lanes<A>& x) {
  const Lanes<A> one = broadcast(kExpUnit<A>);
  const Lanes<A> e = exp_down(-absolute(x));
  return select<A>(x < broadcast(A{0}), e, one) / (one + e);
}

// Of the standard normal distribution.
template <class A>
struct Normal {
  Lanes<A> cumulative;  // 1/2 erfc(-x / sqrt(2)), with its relative accuracy in the lower tail
  Lanes<A> density;     // e^(-x^2 / 2) / sqrt(2 pi)
};

VQKERNELS_LANES_INLINE Normal<float> normal(const Lanes<float>& x) {
  const Lanes<float> one = broadcast(1.0f);
  const Lanes<float> t = minimum(broadcast(15.0f), absolute(x));  // e^(-t^2 / 2) is rounded to 0 beyond 14.5
  // What rounding t^2 leaves over would be multiplied by t^2 in the exponential.
  const Lanes<float> square = t * t, rest = fma(t, t, -square);
  const Lanes<float> e = exp_down(square * broadcast(-0.5f));
  const Lanes<float> decay = fma(e * rest, broadcast(-0.5f), e);  // in units of 1 / kExpUnit
  // cumulative(-t) e^(t^2 / 2) = p(v - m) / (t + 5/2), v = t / (t + 5/2), p of degree 9, t <= 14.5: relative error
  // 1.8e-8. m lies in the middle, where p(0) is close to a float; the coefficients are rounded in ascending order, each
  // followed by a new fit of the rest.
  const Lanes<float> s = one / (t + broadcast(2.5f));
  const Lanes<float> v = fma(t, s, broadcast(-0x1.c6cp-2f));
  Lanes<float> p = broadcast(-0x1.4bc316p-4f);
  p = fma(p, v, broadcast(-0x1.3db434p-5f));
  p = fma(p, v, broadcast(0x1.d4756ap-4f));
  p = fma(p, v, broadcast(0x1.f0e314p-4f));
  p = fma(p, v, broadcast(-0x1.958f66p-4f));
  p = fma(p, v, broadcast(-0x1.ed44p-3f));
  p = fma(p, v, broadcast(0x1.0b08a2p-3f));
  p = fma(p, v, broadcast(0x1.0580f6p-1f));
  p = fma(p, v, broadcast(-0x1.d9e0eep-1f));
  p = fma(p, v, broadcast(0x1.83795ep-1f));
  const Lanes<float> tail = p * s * decay * broadcast(1 / kExpUnit<float>);
  return {select<float>(x < broadcast(0.0f), tail, one - tail), decay * broadcast(0x1.988454p-2f / kExpUnit<float>)};
}
VQKERNELS_LANES_INLINE Normal<double> normal(const Lanes<double>& x) {
  return {each_lane(x, [](double lane) { return 0.5 * std::erfc(lane * -0x1.6a09e667f3bcdp-1); }),  // sqrt(1/2)
          each_lane(x, [](double lane) { return 0x1.9884533d43651p-2 * std::exp(-0.5 * lane * lane); })};
}

}  // namespace
}  // namespace vqkernels::cpu
