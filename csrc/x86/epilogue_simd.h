// What happens to a float result before it is stored: activation functions on Vec. Included after a vec_*.h.
#pragma once

#include "kdq/types.h"

namespace kdq {
namespace {

// exp(x) to about 2 ulp: 2^n * e^r with n = round(x / ln 2), ln 2 split in two so that r is exact, and e^r by its
// Taylor series (|r| <= 0.35, so the term of degree 8 is below float32 rounding). Overflows to inf, flushes to about
// 1e-38 below.
inline Vec::Float exp_vec(Vec::Float x) {
  const Vec::Float clamped = Vec::at_most(Vec::set(88.8F), Vec::at_least(Vec::set(-87.3F), x));
  const Vec::Float n = Vec::round(Vec::mul(clamped, Vec::set(1.44269504F)));
  Vec::Float r = Vec::fma(n, Vec::set(-0.693359375F), clamped);
  r = Vec::fma(n, Vec::set(2.12194440e-4F), r);
  Vec::Float p = Vec::set(1.0F / 5040.0F);
  p = Vec::fma(p, r, Vec::set(1.0F / 720.0F));
  p = Vec::fma(p, r, Vec::set(1.0F / 120.0F));
  p = Vec::fma(p, r, Vec::set(1.0F / 24.0F));
  p = Vec::fma(p, r, Vec::set(1.0F / 6.0F));
  p = Vec::fma(p, r, Vec::set(0.5F));
  p = Vec::fma(p, r, Vec::set(1.0F));
  p = Vec::fma(p, r, Vec::set(1.0F));
  const Vec::Int exponent = Vec::shift_left<23>(Vec::int_add(Vec::to_int(n), Vec::int_set(127)));
  return Vec::mul(p, Vec::as_float(exponent));
}

// erf(|x|) by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: absolute error below 1.5e-7.
inline Vec::Float erf_of_magnitude(Vec::Float magnitude) {
  const Vec::Float one = Vec::set(1.0F);
  const Vec::Float t = Vec::div(one, Vec::fma(magnitude, Vec::set(0.3275911F), one));
  Vec::Float p = Vec::set(1.061405429F);
  p = Vec::fma(p, t, Vec::set(-1.453152027F));
  p = Vec::fma(p, t, Vec::set(1.421413741F));
  p = Vec::fma(p, t, Vec::set(-0.284496736F));
  p = Vec::fma(p, t, Vec::set(0.254829592F));
  const Vec::Float tail = exp_vec(Vec::sub(Vec::zero(), Vec::mul(magnitude, magnitude)));
  return Vec::sub(one, Vec::mul(Vec::mul(p, t), tail));
}

// y / 2 + |y| / 2 * erf(|y| / sqrt 2): erf is odd, so the sign of y drops out of the second term.
inline Vec::Float gelu_vec(Vec::Float y) {
  const Vec::Float magnitude = Vec::abs(y);
  const Vec::Float erf = erf_of_magnitude(Vec::mul(magnitude, Vec::set(0.707106781F)));
  const Vec::Float half = Vec::set(0.5F);
  return Vec::fma(Vec::mul(magnitude, half), erf, Vec::mul(y, half));
}

inline Vec::Float silu_vec(Vec::Float y) {
  return Vec::div(y, Vec::add(Vec::set(1.0F), exp_vec(Vec::sub(Vec::zero(), y))));
}

inline Vec::Float activate(Vec::Float y, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return y;
    case Activation::kRelu:
      return Vec::at_least(Vec::zero(), y);
    case Activation::kGelu:
      return gelu_vec(y);
    case Activation::kSilu:
      return silu_vec(y);
  }
  return y;
}

}  // namespace
}  // namespace kdq
