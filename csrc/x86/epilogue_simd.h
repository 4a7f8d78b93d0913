// What becomes of a tile's float results that do not leave its registers finished: activation functions in place, then
// their way to y. Included after a vec_*.h.
#pragma once

#include "core/tile_output.h"
#include "kdq/types.h"
#include "x86/exp_simd.h"
#include "x86/loops_simd.h"

namespace kdq {
namespace {

// y * Phi(y), Phi the standard normal distribution function: Phi(y) = 1/2 + y R(y^2), R a minimax polynomial on
// y^2 <= kEnd, beyond which Phi is 0 or 1 to within 1e-7. Evaluated on [-1, 1], where its terms do not cancel. Phi is
// off by at most 1.2e-7, as 1/2 (1 + erf) in float32 is too. NaN at -inf, as in torch.
//
// Of several vectors, step by step: one is a chain of 23 instructions that wait for each other, and a CPU that looks
// some hundred instructions ahead sees only four or five such chains at once, half of what its units can do.
template <int kVectors>
inline __attribute__((always_inline)) void gelu(Vec::Float (&y)[kVectors]) {
  constexpr float kEnd = 27.04F;
  constexpr float kR[] = {2.02393771e-4F,  -5.62291988e-4F, 6.00746708e-4F, -9.78510897e-4F, 2.66245939e-3F,
                          -5.06737344e-3F, 8.01007881e-3F,  -0.0123533565F, 0.0181339262F,   -0.0247634505F,
                          0.0319623226F,   -0.0399253974F,  0.0500261099F,  -0.0677438056F,  0.135949978F};
  const Vec::Float half = Vec::set(0.5F);
  Vec::Float t[kVectors];
  Vec::Float r[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const Vec::Float square = Vec::at_most(Vec::set(kEnd), Vec::mul(y[v], y[v]));
    t[v] = Vec::fma(square, Vec::set(2.0F / kEnd), Vec::set(-1.0F));
    r[v] = Vec::set(kR[0]);
  }
#pragma GCC unroll 16
  for (int i = 1; i < 15; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) r[v] = Vec::fma(r[v], t[v], Vec::set(kR[i]));
  }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const Vec::Float e = Vec::at_most(half, Vec::at_least(Vec::sub(Vec::zero(), half), Vec::mul(y[v], r[v])));
    y[v] = Vec::mul(y[v], Vec::add(half, e));
  }
}

template <int kVectors>
inline __attribute__((always_inline)) void silu(Vec::Float (&y)[kVectors]) {
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    y[v] = Vec::div(y[v], Vec::add(Vec::set(1.0F), exp_vec(Vec::sub(Vec::zero(), y[v]))));
  }
}

template <int kVectors>
inline __attribute__((always_inline)) void relu(Vec::Float (&y)[kVectors]) {
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) y[v] = Vec::at_least(Vec::zero(), y[v]);
}

template <int kVectors>
inline __attribute__((always_inline)) void activate_at(float* values, Activation activation) {
  Vec::Float y[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) y[v] = Vec::load(values + v * Vec::kLanes);
  if (activation == Activation::kRelu) relu(y);
  if (activation == Activation::kGelu) gelu(y);
  if (activation == Activation::kSilu) silu(y);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) Vec::store(values + v * Vec::kLanes, y[v]);
}

// In place, of whole vectors.
inline void activate(float* values, int vectors, Activation activation) {
  constexpr int kAtOnce = Vec::kLanes / 2;  // y, t and r of each fit into the registers
  if (activation == Activation::kNone) return;
  int v = 0;
  for (; v + kAtOnce <= vectors; v += kAtOnce) activate_at<kAtOnce>(values + v * Vec::kLanes, activation);
  for (; v < vectors; ++v) activate_at<1>(values + v * Vec::kLanes, activation);
}

template <class T>
inline void store_values_as(const float* values, int width, const TileOutput& out) {
  for (int r = 0; r < out.rows; ++r) {
    T* y = static_cast<T*>(out.y) + r * out.y_stride;
    for_each_vector(out.cols, [&](int64_t i, int n)
                                  __attribute__((always_inline)) { store(y + i, load(values + r * width + i, n), n); });
  }
}

// values: rows of `width`.
inline void store_values(const float* values, int width, const TileOutput& out) {
  switch (out.type) {
    case Result::kFloat32:
      return store_values_as<float>(values, width, out);
    case Result::kBFloat16:
      return store_values_as<BFloat16>(values, width, out);
    case Result::kFloat16:
      return store_values_as<Float16>(values, width, out);
    case Result::kInt32:
    case Result::kBits:
      return;  // no floats
  }
}

}  // namespace
}  // namespace kdq
