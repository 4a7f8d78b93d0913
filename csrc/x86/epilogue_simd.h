// What happens to a float result before it is stored: activation functions on Vec. Included after a vec_*.h.
#pragma once

#include "kdq/types.h"
#include "x86/exp_simd.h"

namespace kdq {
namespace {

// y * Phi(y), Phi the standard normal distribution function. Its tail, Phi(-|y|), has the form of Abramowitz and
// Stegun, Handbook of Mathematical Functions, 7.1.26: exp(-y^2 / 2) times a polynomial in t = 1 / (1 + c |y|). Their
// five coefficients leave an absolute error of 1.5e-7; these eight, a minimax fit on 0 <= |y| <= 14, leave a *relative*
// error of 1.5e-7, so that small results for negative y keep their digits too. NaN at -inf, as in torch.
inline Vec::Float gelu_vec(Vec::Float y) {
  const Vec::Float magnitude = Vec::abs(y);
  const Vec::Float one = Vec::set(1.0F);
  const Vec::Float t = Vec::div(one, Vec::fma(magnitude, Vec::set(0.3F), one));
  Vec::Float p = Vec::set(0.0356763816F);
  p = Vec::fma(p, t, Vec::set(-0.157209670F));
  p = Vec::fma(p, t, Vec::set(0.206364687F));
  p = Vec::fma(p, t, Vec::set(-0.0536937965F));
  p = Vec::fma(p, t, Vec::set(0.128566933F));
  p = Vec::fma(p, t, Vec::set(0.0999119011F));
  p = Vec::fma(p, t, Vec::set(0.120754209F));
  p = Vec::fma(p, t, Vec::set(0.119629283F));
  const Vec::Float exponent = Vec::mul(Vec::mul(magnitude, magnitude), Vec::set(-0.5F));
  const Vec::Float tail = Vec::mul(Vec::mul(p, t), exp_vec(exponent));
  return Vec::mul(y, Vec::select(Vec::less(y, Vec::zero()), tail, Vec::sub(one, tail)));
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
