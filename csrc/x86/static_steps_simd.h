// Static quantization of activations, for the int8 family and bit planes. Included after a vec_*.h.
//
// at() gives a number that rounds to the integer less the zero point. The bounds are integers, so that it may be
// clamped before it is rounded, which narrowing to bytes does by the way. NaN, which clamping keeps, shows in sums of
// all numbers: comparing each takes longer than the rest.
#pragma once

#include "core/int8_gemm_kernels.h"

namespace kdq {
namespace {

struct StaticSteps {
  explicit StaticSteps(const StaticGrid& grid)
      : inverse(Vec::set(grid.inverse)),
        low(Vec::set(static_cast<float>(-grid.zero_point))),
        high(Vec::set(static_cast<float>(grid.quant_max - grid.zero_point))),
        sums{Vec::zero(), Vec::zero()} {}

  // j: tells neighbours apart, whose sums need not wait for each other.
  inline __attribute__((always_inline)) Vec::Float at(Vec::Float x, int j) {
    const Vec::Float v = Vec::at_most(high, Vec::at_least(low, Vec::mul(x, inverse)));
    sums[j % 2] = Vec::add(sums[j % 2], v);
    return v;
  }
  bool has_nan() const { return Vec::bits(Vec::is_nan(Vec::add(sums[0], sums[1]))) != 0; }

  Vec::Float inverse;
  Vec::Float low;
  Vec::Float high;
  Vec::Float sums[2];
};

}  // namespace
}  // namespace kdq
