// Exponentials on Vec. Included after a vec_*.h.
#pragma once

namespace kdq {
namespace {

// Below this, exp is under 1e-38, about the smallest normal float32.
constexpr float kExpFloor = -87.3F;

// exp(x) to about 2 ulp: 2^n * e^r with n = round(x / ln 2), ln 2 split in two so that r is exact, and e^r by its
// Taylor series (|r| <= 0.35, so the term of degree 8 is below float32 rounding). Overflows to inf, flushes to about
// 1e-38 below. NaN stays.
inline Vec::Float exp_vec(Vec::Float x) {
  const Vec::Float clamped = Vec::at_most(Vec::set(88.8F), Vec::at_least(Vec::set(kExpFloor), x));
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

// As exp_vec, but 0 below the floor: what a softmax needs, where a class ruled out by a logit of -inf has no share.
inline Vec::Float exp_or_zero(Vec::Float x) {
  return Vec::select(Vec::less(x, Vec::set(kExpFloor)), Vec::zero(), exp_vec(x));
}

}  // namespace
}  // namespace kdq
