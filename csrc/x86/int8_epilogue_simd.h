// From sums to results in the int8 family: scales, biases, activation functions, types. Included after a vec_*.h.
#pragma once

#include "core/int8_gemm_kernels.h"
#include "x86/epilogue_simd.h"
#include "x86/loops_simd.h"

namespace kdq {
namespace {

inline Vec::Int correction(const Int8Epilogue& e, int64_t i, int n) {
  return Vec::int_mul(load_int(e.column_sum + i, n), Vec::int_set(e.offset));
}

struct Channels {
  Vec::Float weight_scale;
  Vec::Float bias;
};
inline Channels channels_at(const Int8Epilogue& e, int64_t i, int n) {
  return {load(e.weight_scale + i, n),
          e.bias == nullptr ? Vec::set(-0.0F) : load(e.bias + i, n)};  // y + -0 is y, even where y is -0
}

inline Vec::Float scaled(Vec::Float sum, float row_scale, const Channels& c) {
  // Without the bound, two large scales would make inf, and inf * 0 a NaN where the true result is 0.
  const Vec::Float scale = Vec::at_most(Vec::set(kFloatMax), Vec::mul(Vec::set(row_scale), c.weight_scale));
  return Vec::fma(sum, scale, c.bias);
}

// The sums of channels i ... of one row, as floats: exact ones are corrected first.
inline Vec::Float sums_at(const int32_t* sums, Vec::Int off, int64_t i) {
  return Vec::to_float(Vec::int_sub(Vec::int_load(sums + i), off));
}
inline Vec::Float sums_at(const float* sums, Vec::Int, int64_t i) { return Vec::load(sums + i); }

inline void store_int32(const int32_t* sums, int width, const Int8TileCall& call) {
  const TileOutput& out = call.out;
  for_each_vector(out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
    const Vec::Int off = correction(call.epilogue, i, n);
    for (int r = 0; r < out.rows; ++r) {
      int32_t* y = static_cast<int32_t*>(out.y) + r * out.y_stride;
      store_integers(y + i, Vec::int_sub(load_int(sums + r * width + i, n), off), n);
    }
  });
}

inline void store_int32(const float*, int, const Int8TileCall&) {}  // a weight-only product has no such result

// sums: rows of `width`, integers or floats; floats take their places.
template <class Sum>
void store_spilled(Sum* sums, int width, const Int8TileCall& call) {
  const TileOutput& out = call.out;
  if (out.type == Result::kInt32) return store_int32(sums, width, call);
  float* values = reinterpret_cast<float*>(sums);
  for_each_vector(out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
    const Vec::Int off = correction(call.epilogue, i, n);
    const Channels c = channels_at(call.epilogue, i, n);
    for (int r = 0; r < out.rows; ++r) {
      const int64_t at = r * width + i;
      Vec::store(values + at, scaled(sums_at(sums, off, at), call.row_scale[r], c));
    }
  });
  activate(values, out.rows * width / Vec::kLanes, call.epilogue.activation);
  store_values(values, width, out);
}

}  // namespace
}  // namespace kdq
