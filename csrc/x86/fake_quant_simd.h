// The fake-quant loops, written once against Vec. An ISA file includes its vec_*.h first, then this.
//
// The order of the arithmetic is the reference's, operation by
// operation, and nothing is contracted into a fused multiply-add: that is what keeps the bits equal on every ISA.
#pragma once

#include "core/fake_quant_kernels.h"
#include "x86/loops_simd.h"

namespace kdq {
namespace {

struct Loops {
  using F = Vec::Float;
  static constexpr int kLanes = Vec::kLanes;

  struct Grid {
    F scale;
    F inverse;
    F zero_point;
    F quant_min;
    F quant_max;
  };

  static Grid uniform_grid(const RunGrid& g) {
    return {Vec::set(*g.scale), Vec::set(*g.inverse), Vec::set(*g.zero_point), Vec::set(g.quant_min),
            Vec::set(g.quant_max)};
  }

  // The grid of elements i ... i + n - 1: for kUniform the one made before the loop. Built field by field: the compiler
  // keeps the fields in registers then, where a copy of the struct would go through memory in every step.
  template <GridForm kForm>
  static Grid grid_at(const Grid& uniform, const RunGrid& g, int64_t i, int n) {
    return {kForm == kUniform ? uniform.scale : load(g.scale + i, n),
            kForm == kUniform ? uniform.inverse : load(g.inverse + i, n),
            kForm == kUniform ? uniform.zero_point : load(g.zero_point + i, n), uniform.quant_min, uniform.quant_max};
  }

  static F unclamped(F x, const Grid& g) { return Vec::add(Vec::round(Vec::mul(x, g.inverse)), g.zero_point); }
  static F clamp(F q, const Grid& g) { return Vec::at_most(g.quant_max, Vec::at_least(g.quant_min, q)); }
  static F fake(F q, const Grid& g) { return Vec::mul(Vec::sub(q, g.zero_point), g.scale); }

  template <class T, GridForm kForm>
  static void forward(const void* x_raw, void* y_raw, int64_t count, const RunGrid& grid) {
    const T* x = static_cast<const T*>(x_raw);
    T* y = static_cast<T*>(y_raw);
    const Grid uniform = uniform_grid(grid);
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Grid g = grid_at<kForm>(uniform, grid, i, n);
      store(y + i, fake(clamp(unclamped(load(x + i, n), g), g), g), n);
    });
  }

  template <class T, GridForm kForm>
  static void backward(const void* grad_raw, const void* x_raw, void* grad_x_raw, int64_t count, const RunGrid& grid,
                       float* scale_sum, float* zero_point_sum) {
    const T* grad_y = static_cast<const T*>(grad_raw);
    const T* x = static_cast<const T*>(x_raw);
    T* grad_x = static_cast<T*>(grad_x_raw);
    const Grid uniform = uniform_grid(grid);
    F scale_total = Vec::zero();
    F zero_point_total = Vec::zero();
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Grid g = grid_at<kForm>(uniform, grid, i, n);
      const F value = load(x + i, n);
      const F dy = load(grad_y + i, n);
      const F before = unclamped(value, g);
      const F q = clamp(before, g);
      const Vec::Mask inside = Vec::equal(before, q);
      if (grad_x != nullptr) store(grad_x + i, Vec::select(inside, dy, Vec::zero()), n);
      const F step_error = Vec::mul(Vec::sub(fake(q, g), value), g.inverse);
      // In a partial vector the lanes past the end have dy = 0, and x = 0 or a zero grid: they add nothing.
      const F d_scale = Vec::mul(dy, Vec::select(inside, step_error, Vec::sub(q, g.zero_point)));
      const F d_zero_point = Vec::select(inside, Vec::zero(), Vec::mul(dy, Vec::sub(Vec::zero(), g.scale)));
      if (kForm == kUniform) {
        scale_total = Vec::add(scale_total, d_scale);
        zero_point_total = Vec::add(zero_point_total, d_zero_point);
      } else {
        store(scale_sum + i, Vec::add(load(scale_sum + i, n), d_scale), n);
        store(zero_point_sum + i, Vec::add(load(zero_point_sum + i, n), d_zero_point), n);
      }
    });
    if (kForm == kUniform) {
      *scale_sum = Vec::sum(scale_total);
      *zero_point_sum = Vec::sum(zero_point_total);
    }
  }

  template <class T, class Q, GridForm kForm>
  static void quantize(const void* x_raw, void* q_raw, int64_t count, const RunGrid& grid) {
    const T* x = static_cast<const T*>(x_raw);
    Q* q = static_cast<Q*>(q_raw);
    const Grid uniform = uniform_grid(grid);
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Grid g = grid_at<kForm>(uniform, grid, i, n);
      const F value = clamp(unclamped(load(x + i, n), g), g);
      store_integers(q + i, Vec::to_int(Vec::select(Vec::is_nan(value), g.zero_point, value)), n);
    });
  }

  template <class Q, GridForm kForm>
  static void dequantize(const void* q_raw, float* y, int64_t count, const RunGrid& grid) {
    const Q* q = static_cast<const Q*>(q_raw);
    const Grid uniform = uniform_grid(grid);
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Grid g = grid_at<kForm>(uniform, grid, i, n);
      const Vec::Int integers = n == kLanes ? Vec::int_load(q + i) : Vec::int_load_part(q + i, n);
      store(y + i, fake(Vec::to_float(integers), g), n);
    });
  }

  template <class T>
  static float quantize_row(const void* x_raw, int64_t count, int8_t* q) {
    const T* x = static_cast<const T*>(x_raw);
    const float scale = symmetric_scale(x, count);
    if (!(scale <= kFloatMax)) {  // NaN or inf
      memset(q, 0, static_cast<size_t>(count));
      return scale;
    }
    const F inverse = Vec::set(1.0F / scale);
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      store_integers(q + i, Vec::to_int(symmetric127(load(x + i, n), inverse)), n);
    });
    return scale;
  }

  template <class T>
  static void fake_quantize_row(const void* x_raw, int64_t count, void* y_raw) {
    const T* x = static_cast<const T*>(x_raw);
    T* y = static_cast<T*>(y_raw);
    const float scale_or_not = symmetric_scale(x, count);
    const bool finite = scale_or_not <= kFloatMax;
    const F scale = Vec::set(finite ? scale_or_not : __builtin_nanf(""));
    const F inverse = Vec::set(1.0F / scale_or_not);
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const F q = Vec::add(symmetric127(load(x + i, n), inverse), Vec::zero());  // -0 becomes the integer's +0
      store(y + i, Vec::mul(q, scale), n);
    });
  }

  template <class T>
  static float binarize(const void* x_raw, int64_t count, void* signs_raw) {
    const T* x = static_cast<const T*>(x_raw);
    T* signs = static_cast<T*>(signs_raw);
    F sum = Vec::zero();
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const F value = load(x + i, n);
      store(signs + i, Vec::select(Vec::less(value, Vec::zero()), Vec::set(-1.0F), Vec::set(1.0F)), n);
      sum = Vec::add(sum, Vec::abs(value));
    });
    return Vec::sum(sum);
  }

  template <class T>
  static void binarize_backward(const void* grad_raw, float mean_step, const void* x_raw, int64_t count,
                                void* grad_x_raw) {
    const T* grad = static_cast<const T*>(grad_raw);
    const T* x = static_cast<const T*>(x_raw);
    T* grad_x = static_cast<T*>(grad_x_raw);
    const F up = Vec::set(mean_step);
    const F down = Vec::set(-mean_step);
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const F value = load(x + i, n);
      const F dy = grad == nullptr ? Vec::zero() : load(grad + i, n);
      // Below the float after 1 is at most 1; and false for NaN.
      const F straight = Vec::select(Vec::less(Vec::abs(value), Vec::set(1.00000012F)), dy, Vec::zero());
      const F negative = Vec::select(Vec::less(value, Vec::zero()), down, Vec::zero());
      const F through_mean = Vec::select(Vec::less(Vec::zero(), value), up, negative);
      store(grad_x + i, Vec::add(straight, through_mean), n);
    });
  }
};

}  // namespace
}  // namespace kdq
