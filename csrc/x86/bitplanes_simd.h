// What products of bit planes (kdq/bitplanes.h) have beside the binary family's loops: the planes of activations, and
// the way from weighted counts of differing bits to results. Included after a vec_*.h.
#pragma once

#include "core/binary_gemm_kernels.h"
#include "x86/int8_epilogue_simd.h"
#include "x86/loops_simd.h"
#include "x86/static_steps_simd.h"

namespace kdq {
namespace {

// The integers of 64 values or fewer, as bytes, by the steps of the int8 family's static quantization; 0 past the last.
template <class T>
inline __attribute__((always_inline)) void quantize_word(const T* x, int count, int zero_point, StaticSteps* steps,
                                                         uint8_t* bytes) {
  constexpr int kStep = 4 * Vec::kLanes;
  if (count == 64) {
#pragma GCC unroll 2
    for (int i = 0; i < 64; i += kStep) {
      Vec::Float v[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) v[j] = steps->at(Vec::load(x + i + j * Vec::kLanes), j);
      Vec::store_rounded<0>(bytes + i, v, zero_point);
    }
  } else {
    memset(bytes, 0, 64);
    const Vec::Int offset = Vec::int_set(zero_point);
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      store_integers(bytes + i, Vec::int_add(Vec::to_int(steps->at(load(x + i, n), 0)), offset), n);
    });
  }
}

template <class T>
inline PlaneRow quantize_planes(const PlaneRowCall& call) {
  const T* x = static_cast<const T*>(call.x);
  const int zero_point = call.grid.zero_point;
  StaticSteps steps(call.grid);
  alignas(64) uint8_t bytes[64];
  PlaneRow row = {0, false};
  uint64_t* planes = call.planes;
  for (int64_t first = 0; first < call.k; first += 64, ++planes) {
    const int count = call.k - first < 64 ? static_cast<int>(call.k - first) : 64;
    quantize_word(x + first, count, zero_point, &steps, bytes);
    Vec::store_bits(bytes, call.bits, planes, call.stride);
    for (int p = 0; p < call.bits; ++p) {
      row.sum += static_cast<int64_t>(__builtin_popcountll(planes[p * call.stride])) << p;
    }
  }
  row.has_nan = steps.has_nan();
  return row;
}

// body(i, n, columns) for vectors of channels i ... i + n - 1, with what products of all rows have in common there.
template <class Body>
inline __attribute__((always_inline)) void for_each_columns(const PlaneEpilogue& planes, int cols, Body body) {
  const Vec::Int factor = Vec::int_set(planes.column_factor);
  for_each_vector(cols, [&](int64_t i, int n) __attribute__((always_inline)) {
    body(i, n, Vec::int_mul(load_int(planes.layer.column_sum + i, n), factor));
  });
}
inline Vec::Int plane_product(const PlaneEpilogue& planes, int r, Vec::Int columns, const int32_t* count) {
  const Vec::Int terms = Vec::int_add(columns, Vec::int_set(planes.row_term[r]));
  const Vec::Int less = Vec::int_mul(Vec::int_load(count), Vec::int_set(planes.count_factor));
  return Vec::shift_right_signed<1>(Vec::int_sub(terms, less));
}

// As the int8 family's tiles finish theirs in registers.
inline void store_planes_float32(const int32_t* counts, int width, const PlaneEpilogue& planes, const TileOutput& out) {
  const Int8Epilogue& e = planes.layer;
  const Vec::Float floor = Vec::set(e.activation == Activation::kRelu ? 0.0F : -__builtin_inff());
  for_each_columns(planes, out.cols, [&](int64_t i, int n, Vec::Int columns) __attribute__((always_inline)) {
    const Vec::Int off = correction(e, i, n);
    const Channels c = channels_at(e, i, n);
    float* y = static_cast<float*>(out.y) + i;
    for (int r = 0; r < out.rows; ++r) {
      const Vec::Int exact = Vec::int_sub(plane_product(planes, r, columns, counts + r * width + i), off);
      store(y + r * out.y_stride, Vec::at_least(floor, scaled(Vec::to_float(exact), planes.row_scale[r], c)), n);
    }
  });
}

// counts: rows of `width`, whole vectors, which may be overwritten.
inline void store_planes(int32_t* counts, int width, const PlaneEpilogue& planes, const TileOutput& out) {
  if (out.type == Result::kFloat32 && planes.layer.activation <= Activation::kRelu) {
    return store_planes_float32(counts, width, planes, out);
  }
  for_each_columns(planes, out.cols, [&](int64_t i, int, Vec::Int columns) __attribute__((always_inline)) {
    for (int r = 0; r < out.rows; ++r) {
      int32_t* at = counts + r * width + i;
      Vec::store_int(at, plane_product(planes, r, columns, at));
    }
  });
  Int8TileCall call = {};
  call.row_scale = planes.row_scale;
  call.epilogue = planes.layer;
  call.out = out;
  store_spilled(counts, width, call);
}

}  // namespace
}  // namespace kdq
