// The int8 family's loops, written once. An ISA file includes its vec_*.h, defines `struct Dot` (its dot-product
// instruction and register tile), and then includes this.
//
// The micro-kernel keeps a tile of kRows x (kCols vectors a panel) of int32 sums in registers. Each step along K loads
// the vectors of weights, one 32-bit unit (2 x s16 or 4 x u8) of each of the kRows activation rows, broadcast to all
// lanes, and issues kRows * kCols dot products. Lanes are output channels, so no sum ever crosses a lane.
#pragma once

#include "core/int8_gemm_kernels.h"
#include "x86/epilogue_simd.h"
#include "x86/loops_simd.h"

namespace kdq {
namespace {

struct Loops {
  using F = Vec::Float;
  using I = Vec::Int;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kCols = Dot::kCols;
  static constexpr int kPanel = kCols * kLanes;  // channels of a panel
  using Prepared = Dot::Prepared;

  // ---- prepare ----

  static void pad(Prepared* row, int64_t k) {
    for (int64_t i = k; i % Dot::kUnit != 0; ++i) row[i] = 0;
  }

  static void prepare_int8(const int8_t* a, int64_t k, void* row_raw) {
    Prepared* row = static_cast<Prepared*>(row_raw);
    const I offset = Vec::int_set(Dot::kOffset);
    for_each_vector(k, [&](int64_t i, int n) __attribute__((always_inline)) {
      const I value = n == kLanes ? Vec::int_load(a + i) : Vec::int_load_part(a + i, n);
      store_integers(row + i, Vec::int_add(value, offset), n);
    });
    pad(row, k);
  }

  template <class T>
  static float prepare_dynamic(const void* x_raw, int64_t k, void* row_raw) {
    const T* x = static_cast<const T*>(x_raw);
    Prepared* row = static_cast<Prepared*>(row_raw);
    const float scale = symmetric_scale(x, k);
    const bool finite = scale <= kFloatMax;
    const F inverse = Vec::set(finite ? 1.0F / scale : 0.0F);
    const I offset = Vec::int_set(Dot::kOffset);
    for_each_vector(k, [&](int64_t i, int n) __attribute__((always_inline)) {
      const F q = finite ? symmetric127(load(x + i, n), inverse) : Vec::zero();
      store_integers(row + i, Vec::int_add(Vec::to_int(q), offset), n);
    });
    pad(row, k);
    return finite ? scale : __builtin_nanf("");
  }

  template <class T>
  static float prepare_static(const void* x_raw, int64_t k, const StaticGrid& grid, float scale, void* row_raw) {
    const T* x = static_cast<const T*>(x_raw);
    Prepared* row = static_cast<Prepared*>(row_raw);
    const F inverse = Vec::set(grid.inverse);
    const F zero_point = Vec::set(grid.zero_point);
    const F quant_max = Vec::set(grid.quant_max);
    uint32_t nan_lanes = 0;
    for_each_vector(k, [&](int64_t i, int n) __attribute__((always_inline)) {
      const F value = load(x + i, n);
      const Vec::Mask is_nan = Vec::is_nan(value);
      nan_lanes |= Vec::bits(is_nan);
      const F q = Vec::add(Vec::round(Vec::mul(value, inverse)), zero_point);
      const F clamped = Vec::at_most(quant_max, Vec::at_least(Vec::zero(), q));
      store_integers(row + i, Vec::to_int(Vec::select(is_nan, Vec::zero(), clamped)), n);
    });
    pad(row, k);
    return nan_lanes != 0 ? __builtin_nanf("") : scale;
  }

  template <class T>
  static void widen(const void* x_raw, int64_t k, float* row) {
    const T* x = static_cast<const T*>(x_raw);
    for_each_vector(k, [&](int64_t i, int n) __attribute__((always_inline)) { store(row + i, load(x + i, n), n); });
    for (int64_t i = k; i % Dot::kUnit != 0; ++i) row[i] = 0.0F;
  }

  // ---- tile ----

  // kRows rows of kPanels panels. Vectors of channels: kCols of the first panel, then kCols of the second, ...
  template <int kRows, int kPanels>
  static void tile_of(const char* a, int64_t row_stride, const PanelGroup& panels, int64_t units, int32_t* acc) {
    constexpr int kVectors = kPanels * kCols;
    I sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec::int_zero();
    }
    const int8_t* panel = panels.first;
    for (int64_t u = 0; u < units; ++u) {
      I weights[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) weights[v] = weights_at(panel, panels, v);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int32_t unit = 0;
        memcpy(&unit, a + r * row_stride + u * 4, sizeof(unit));
        const I activations = Vec::int_set(unit);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Dot::dot(sum[r][v], activations, weights[v]);
      }
      panel += kPanel * Dot::kUnit;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) Vec::store_int(acc + (r * kVectors + v) * kLanes, sum[r][v]);
    }
  }

  // Vector v of the weights of one step along k; panel: where the first panel's lie.
  static inline __attribute__((always_inline)) I weights_at(const int8_t* panel, const PanelGroup& panels, int v) {
    return Dot::load_weights(panel + v / kCols * panels.stride + v % kCols * kLanes * Dot::kUnit);
  }

  // Weights of element j of each unit, widened to float32: the unit's bits shifted up to the sign and back down.
  template <int j>
  static F float_weights(I weights) {
    constexpr int kBits = 32 / Dot::kUnit;
    return Vec::to_float(Vec::shift_right_signed<32 - kBits>(Vec::shift_left<32 - kBits*(j + 1)>(weights)));
  }

  template <int kRows, int kVectors, int j>
  static inline __attribute__((always_inline)) void float_step(const float* a, int64_t row_stride, const I* weights,
                                                               F (&sum)[kRows][kVectors]) {
    F w[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) w[v] = float_weights<j>(weights[v]);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F x = Vec::set(a[r * row_stride + j]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec::fma(x, w[v], sum[r][v]);
    }
    if constexpr (j + 1 < Dot::kUnit) float_step<kRows, kVectors, j + 1>(a, row_stride, weights, sum);
  }

  template <int kRows, int kPanels>
  static void float_tile_of(const float* a, int64_t row_stride, const PanelGroup& panels, int64_t units, float* acc) {
    constexpr int kVectors = kPanels * kCols;
    F sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec::zero();
    }
    const int8_t* panel = panels.first;
    for (int64_t u = 0; u < units; ++u) {
      I weights[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) weights[v] = weights_at(panel, panels, v);
      float_step<kRows, kVectors, 0>(a + u * Dot::kUnit, row_stride, weights, sum);
      panel += kPanel * Dot::kUnit;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) Vec::store(acc + (r * kVectors + v) * kLanes, sum[r][v]);
    }
  }

  // From a run-time number of rows and panels to the instance compiled for it.
  template <int kRows>
  static void choose_tile(const char* a, int64_t row_stride, int rows, const PanelGroup& panels, int64_t units,
                          int32_t* acc) {
    constexpr int kAtOnce = panels_at_once(Dot::kRows, kRows);
    if (rows == kRows) {
      return panels.count == 1 ? tile_of<kRows, 1>(a, row_stride, panels, units, acc)
                               : tile_of<kRows, kAtOnce>(a, row_stride, panels, units, acc);
    }
    if constexpr (kRows > 1) choose_tile<kRows - 1>(a, row_stride, rows, panels, units, acc);
  }
  template <int kRows>
  static void choose_float_tile(const float* a, int64_t row_stride, int rows, const PanelGroup& panels, int64_t units,
                                float* acc) {
    constexpr int kAtOnce = float_panels_at_once(Dot::kRows, kRows);
    if (rows == kRows) {
      return panels.count == 1 ? float_tile_of<kRows, 1>(a, row_stride, panels, units, acc)
                               : float_tile_of<kRows, kAtOnce>(a, row_stride, panels, units, acc);
    }
    if constexpr (kRows > 1) choose_float_tile<kRows - 1>(a, row_stride, rows, panels, units, acc);
  }

  static void tile(const void* a, int64_t row_stride, int rows, const PanelGroup& panels, int64_t units, int32_t* acc) {
    choose_tile<Dot::kRows>(static_cast<const char*>(a), row_stride, rows, panels, units, acc);
  }
  static void float_tile(const float* a, int64_t row_stride, int rows, const PanelGroup& panels, int64_t units,
                         float* acc) {
    choose_float_tile<Dot::kRows>(a, row_stride, rows, panels, units, acc);
  }

  // ---- epilogue ----
  // Vectors of channels outside, rows inside: what belongs to a channel is read once a tile.

  static I load_int(const int32_t* p, int n) { return n == kLanes ? Vec::int_load(p) : Vec::int_load_part(p, n); }

  static I correction(const Int8Epilogue& e, int64_t i, int n) {
    return Vec::int_mul(load_int(e.column_sum + i, n), Vec::int_set(e.offset));
  }

  static void store_int32(const int32_t* acc, const Int8Epilogue& e, const TileOutput& out) {
    for_each_vector(out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
      const I off = correction(e, i, n);
      for (int r = 0; r < out.rows; ++r) {
        int32_t* y = static_cast<int32_t*>(out.y) + r * out.y_stride;
        store_integers(y + i, Vec::int_sub(load_int(acc + r * out.width + i, n), off), n);
      }
    });
  }

  // Channels i ... i + n - 1; value(r): their sums in row r, as floats.
  template <class T, class Value>
  static inline __attribute__((always_inline)) void store_scaled(const Int8Epilogue& e, const float* row_scale,
                                                                 const TileOutput& out, int64_t i, int n, Value value) {
    const F weight_scale = load(e.weight_scale + i, n);
    const F bias = e.bias == nullptr ? Vec::set(-0.0F) : load(e.bias + i, n);  // y + -0 is y, even where y is -0
    for (int r = 0; r < out.rows; ++r) {
      // Without the bound, two large scales would make inf, and inf * 0 a NaN where the true result is 0.
      const F scale = Vec::at_most(Vec::set(kFloatMax), Vec::mul(Vec::set(row_scale[r]), weight_scale));
      const F y = activate(Vec::add(Vec::mul(value(r), scale), bias), e.activation);
      store(static_cast<T*>(out.y) + r * out.y_stride + i, y, n);
    }
  }

  template <class T>
  static void store_linear(const int32_t* acc, const Int8Epilogue& e, const float* row_scale, const TileOutput& out) {
    for_each_vector(out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
      const I off = correction(e, i, n);
      store_scaled<T>(e, row_scale, out, i, n, [&](int r) __attribute__((always_inline)) {
        return Vec::to_float(Vec::int_sub(load_int(acc + r * out.width + i, n), off));
      });
    });
  }

  template <class T>
  static void store_float(const float* acc, const Int8Epilogue& e, const float* row_scale, const TileOutput& out) {
    for_each_vector(out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
      store_scaled<T>(e, row_scale, out, i, n,
                      [&](int r) __attribute__((always_inline)) { return load(acc + r * out.width + i, n); });
    });
  }
};

constexpr Int8Tile kTile = {Dot::kRows, Loops::kPanel, Dot::kUnit, sizeof(Dot::Prepared), Dot::kOffset};

}  // namespace
}  // namespace kdq
