// From an exact sum to a result in the reference kernels: of the int8 family, and of products of bit planes.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "core/int8_gemm_kernels.h"
#include "reference/activation.h"
#include "reference/scalar.h"

namespace kdq::reference {

// The integer of a value on an unsigned grid; NaN is 0.
inline int32_t quantize(float value, const StaticGrid& grid) {
  const float q = std::nearbyint(value * grid.inverse) + static_cast<float>(grid.zero_point);
  return std::isnan(q) ? 0 : static_cast<int32_t>(std::min(std::max(q, 0.0F), static_cast<float>(grid.quant_max)));
}

// sum, exact or of floats, of channel c -> y[c].
inline void store_scaled(float sum, float row_scale, const Int8Epilogue& e, int64_t c, const TileOutput& out) {
  float scale = row_scale * e.weight_scale[c];
  if (scale > FLT_MAX) scale = FLT_MAX;  // inf * 0 would be NaN where the true result is 0
  const float y = activate(sum * scale + (e.bias == nullptr ? 0.0F : e.bias[c]), e.activation);
  store_as(out.type, out.y, c, y);
}

// sum: of raw products, modulo 2^32.
inline void store_exact(uint32_t sum, float row_scale, const Int8Epilogue& e, int64_t c, const TileOutput& out) {
  const auto exact =
      static_cast<int32_t>(sum - static_cast<uint32_t>(e.offset) * static_cast<uint32_t>(e.column_sum[c]));
  if (out.type == Result::kInt32) {
    static_cast<int32_t*>(out.y)[c] = exact;
  } else {
    store_scaled(static_cast<float>(exact), row_scale, e, c, out);
  }
}

}  // namespace kdq::reference
