// Exponentials on Vec. Included after a vec_*.h.
#pragma once

namespace kdq {
namespace {

// Below this, exp is under 1e-38, about the smallest normal float32.
constexpr float kExpFloor = -87.3F;

// exp(x) to about 2 ulp for x from kExpFloor to 88: 2^n * e^r with n = round(x / ln 2), ln 2 split in two so that r is
// exact, and e^r by a polynomial of degree 6 with the least relative error on |r| <= ln 2 / 2, 4e-9, far below float32
// rounding. NaN stays.
inline Vec::Float exp_in_range(Vec::Float x) {
  const Vec::Float n = Vec::round(Vec::mul(x, Vec::set(1.44269504F)));
  Vec::Float r = Vec::fma(n, Vec::set(-0.693359375F), x);
  r = Vec::fma(n, Vec::set(2.12194440e-4F), r);
  Vec::Float p = Vec::set(0.00138145394F);
  p = Vec::fma(p, r, Vec::set(0.00836874545F));
  p = Vec::fma(p, r, Vec::set(0.041668389F));
  p = Vec::fma(p, r, Vec::set(0.166665211F));
  p = Vec::fma(p, r, Vec::set(0.49999994F));
  p = Vec::fma(p, r, Vec::set(1.0F));
  p = Vec::fma(p, r, Vec::set(1.0F));
  return Vec::times_power(p, n);
}

// exp(x) for every x: overflows to inf, flushes to about 1e-38 below.
inline Vec::Float exp_vec(Vec::Float x) {
  return exp_in_range(Vec::at_most(Vec::set(88.8F), Vec::at_least(Vec::set(kExpFloor), x)));
}

// exp(x) for x <= 0, but 0 below the floor: what a softmax needs, where a class ruled out by a logit of -inf has no
// share.
inline Vec::Float exp_or_zero(Vec::Float x) {
  const Vec::Float floor = Vec::set(kExpFloor);
  return Vec::select(Vec::less(x, floor), Vec::zero(), exp_in_range(Vec::at_least(floor, x)));
}

// 2^x for x <= 0 to about 2 ulp, but 0 below -126, where it would leave the normal numbers: the same without the two
// steps that split x by ln 2. NaN stays.
inline Vec::Float exp2_or_zero(Vec::Float x) {
  const Vec::Float floor = Vec::set(-126.0F);
  const Vec::Float inside = Vec::at_least(floor, x);
  const Vec::Float n = Vec::round(inside);
  const Vec::Float r = Vec::sub(inside, n);
  Vec::Float p = Vec::set(0.00015353362F);
  p = Vec::fma(p, r, Vec::set(0.00133988739F));
  p = Vec::fma(p, r, Vec::set(0.00961843692F));
  p = Vec::fma(p, r, Vec::set(0.0555033237F));
  p = Vec::fma(p, r, Vec::set(0.240226477F));
  p = Vec::fma(p, r, Vec::set(0.693147182F));
  p = Vec::fma(p, r, Vec::set(1.0F));
  return Vec::select(Vec::less(x, floor), Vec::zero(), Vec::times_power(p, n));
}

}  // namespace
}  // namespace kdq
