// The fake-quant loops, written once against Vec. An ISA file includes its vec_*.h first, then this.
//
// The results have the reference's bits on every ISA: nothing that is stored is contracted into a fused multiply-add
// that would round otherwise, and where the order of the arithmetic is not the reference's, it says why that makes no
// difference. The sums behind the gradients of scale and zero point are equal up to rounding only.
#pragma once

#include "core/fake_quant_kernels.h"
#include "x86/loops_simd.h"

namespace kdq {
namespace {

struct Loops {
  using F = Vec::Float;
  static constexpr int kLanes = Vec::kLanes;

  // low and high: quant_min and quant_max less the zero point. Clamping round(x / scale) to these gives
  // q - zero_point itself, bit for bit, since every step is exact up to 2^24 and clamped beyond; and saves adding the
  // zero point only to subtract it again.
  struct Grid {
    F scale;
    F inverse;
    F zero_point;
    F low;
    F high;
  };

  static Grid uniform_grid(const RunGrid& g) {
    return {Vec::set(*g.scale), Vec::set(*g.inverse), Vec::set(*g.zero_point), Vec::set(g.quant_min - *g.zero_point),
            Vec::set(g.quant_max - *g.zero_point)};
  }

  // The grid of elements i ... i + n - 1: for kUniform the one made before the loop. g is the loop's own copy, since a
  // store might change the caller's, and its pointers would be read anew in every step. Built field by field: the
  // compiler keeps the fields in registers then, where a copy of the struct would go through memory in every step.
  template <GridForm kForm>
  static Grid grid_at(const Grid& uniform, const RunGrid& g, int64_t i, int n) {
    return grid_of<kForm>(uniform, g, kForm == kUniform ? uniform.scale : load(g.scale + i, n),
                          kForm == kUniform ? uniform.inverse : load(g.inverse + i, n),
                          kForm == kUniform ? uniform.zero_point : load(g.zero_point + i, n));
  }
  template <GridForm kForm>
  static Grid grid_of(const Grid& uniform, const RunGrid& g, F scale, F inverse, F zero_point) {
    return {scale, inverse, zero_point, kForm == kUniform ? uniform.low : Vec::sub(Vec::set(g.quant_min), zero_point),
            kForm == kUniform ? uniform.high : Vec::sub(Vec::set(g.quant_max), zero_point)};
  }

  // q - zero_point, which may be -0.
  static F clamp(F rounded, const Grid& g) { return Vec::at_most(g.high, Vec::at_least(g.low, rounded)); }
  static F centred(F x, const Grid& g) { return clamp(Vec::round(Vec::mul(x, g.inverse)), g); }
  // + 0 turns the product of a -0 into the +0 that an integer would give, and changes no other: fused, it rounds once,
  // as the product alone does.
  static F fake(F q, const Grid& g) { return Vec::fma(q, g.scale, Vec::zero()); }

  // A field of the grids of elements i ... i + 2 kLanes - 1, in the order of a pair of T.
  template <class T, GridForm kForm>
  static Vec::Pair pair_of(F uniform, const float* each, int64_t i) {
    if (kForm == kUniform) return {uniform, uniform};
    return Vec::load_pair_for(static_cast<const T*>(nullptr), each + i);
  }

  // With a scale an element, several rows share what is loaded of the grid: each alone would spend more on the grid
  // than on x. Two while everything lies in caches, where more streams at once are slower; eight from memory.
  template <class T, GridForm kForm, bool kStream>
  static void forward(const void* x_raw, void* y_raw, int64_t count, const RunGrid& grid, int64_t rows,
                      int64_t stride) {
    constexpr int kAtOnce = kForm == kUniform ? 1 : kStream ? 8 : 2;
    const T* x = static_cast<const T*>(x_raw);
    T* y = static_cast<T*>(y_raw);
    int64_t row = 0;
    for (; row + kAtOnce <= rows; row += kAtOnce) {
      forward_rows<T, kForm, kStream, kAtOnce>(x + row * stride, y + row * stride, stride, count, grid);
    }
    for (; row < rows; ++row) {
      forward_rows<T, kForm, kStream, 1>(x + row * stride, y + row * stride, stride, count, grid);
    }
    if (kStream) _mm_sfence();
  }

  template <class T, GridForm kForm, bool kStream, int kRows>
  static void forward_rows(const T* x, T* y, int64_t stride, int64_t count, const RunGrid& run) {
    const RunGrid grid = run;
    const Grid uniform = uniform_grid(grid);
    int64_t done = 0;
    for (; done + 2 * kLanes <= count; done += 2 * kLanes) {
      const Vec::Pair scale = pair_of<T, kForm>(uniform.scale, grid.scale, done);
      const Vec::Pair inverse = pair_of<T, kForm>(uniform.inverse, grid.inverse, done);
      const Vec::Pair zero_point = pair_of<T, kForm>(uniform.zero_point, grid.zero_point, done);
      const Grid first = grid_of<kForm>(uniform, grid, scale.first, inverse.first, zero_point.first);
      const Grid second = grid_of<kForm>(uniform, grid, scale.second, inverse.second, zero_point.second);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int64_t i = r * stride + done;
        // Several rows are streams enough to keep the memory busy.
        if (kStream && kRows == 1) prefetch_ahead(x + i, 2 * kLanes);
        const Vec::Pair value = Vec::load_pair(x + i);
        put_pair<kStream>(y + i,
                          {fake(centred(value.first, first), first), fake(centred(value.second, second), second)});
      }
    }
    for_each_vector(count - done, [&](int64_t offset, int n) __attribute__((always_inline)) {
      const Grid g = grid_at<kForm>(uniform, grid, done + offset, n);
      for (int r = 0; r < kRows; ++r) {
        const int64_t i = r * stride + done + offset;
        put<kStream>(y + i, fake(centred(load(x + i, n), g), g), n);
      }
    });
  }

  // (fake - x) / scale is summed as q - x * (1 / scale): as close to the truth, and shorter.
  template <class T, GridForm kForm, bool kStream>
  static void backward(const void* grad_raw, const void* x_raw, void* grad_x_raw, int64_t count, const RunGrid& run,
                       float* scale_sum, float* zero_point_sum) {
    const T* grad_y = static_cast<const T*>(grad_raw);
    const T* x = static_cast<const T*>(x_raw);
    T* grad_x = static_cast<T*>(grad_x_raw);
    const RunGrid grid = run;
    const Grid uniform = uniform_grid(grid);
    F scale_total = Vec::zero();
    F outside_total = Vec::zero();
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Grid g = grid_at<kForm>(uniform, grid, i, n);
      const F dy = load(grad_y + i, n);
      const F steps = Vec::mul(load(x + i, n), g.inverse);
      const F rounded = Vec::round(steps);
      const F q = clamp(rounded, g);
      const Vec::Mask inside = Vec::equal(rounded, q);
      if (grad_x != nullptr) put<kStream>(grad_x + i, Vec::select(inside, dy, Vec::zero()), n);
      // In a partial vector the lanes past the end have dy = 0, and x = 0 or a zero grid: they add nothing.
      const F d_scale = Vec::sub_where(inside, q, steps);
      if (kForm == kUniform) {
        scale_total = Vec::fma(dy, d_scale, scale_total);
        outside_total = Vec::add_unless(inside, outside_total, dy);
      } else {
        store(scale_sum + i, Vec::fma(dy, d_scale, load(scale_sum + i, n)), n);
        const F d_zero_point = Vec::mul(dy, Vec::sub(Vec::zero(), g.scale));
        store(zero_point_sum + i, Vec::add_unless(inside, load(zero_point_sum + i, n), d_zero_point), n);
      }
    });
    if (kForm == kUniform) {
      *scale_sum = Vec::sum(scale_total);
      *zero_point_sum = Vec::sum(outside_total) * -*grid.scale;
    }
    if (kStream) _mm_sfence();
  }

  template <class T, class Q, GridForm kForm>
  static void quantize(const void* x_raw, void* q_raw, int64_t count, const RunGrid& run) {
    const T* x = static_cast<const T*>(x_raw);
    Q* q = static_cast<Q*>(q_raw);
    const RunGrid grid = run;
    const Grid uniform = uniform_grid(grid);
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Grid g = grid_at<kForm>(uniform, grid, i, n);
      const F value = centred(load(x + i, n), g);
      const F integer = Vec::add(Vec::select(Vec::is_nan(value), Vec::zero(), value), g.zero_point);
      store_integers(q + i, Vec::to_int(integer), n);
    });
  }

  template <class Q, GridForm kForm>
  static void dequantize(const void* q_raw, float* y, int64_t count, const RunGrid& run) {
    const Q* q = static_cast<const Q*>(q_raw);
    const RunGrid grid = run;
    const Grid uniform = uniform_grid(grid);
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Grid g = grid_at<kForm>(uniform, grid, i, n);
      const Vec::Int integers = n == kLanes ? Vec::int_load(q + i) : Vec::int_load_part(q + i, n);
      store(y + i, Vec::mul(Vec::sub(Vec::to_float(integers), g.zero_point), g.scale), n);
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
  static void binarize_sums(const void* grad_raw, const void* x_raw, int64_t count, float* magnitude, float* product) {
    const T* grad = static_cast<const T*>(grad_raw);
    const T* x = static_cast<const T*>(x_raw);
    F magnitude_sum = Vec::zero();
    F product_sum = Vec::zero();
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const F value = load(x + i, n);
      const F dy = load(grad + i, n);
      magnitude_sum = Vec::add(magnitude_sum, Vec::abs(value));
      const F negated = Vec::sub(Vec::zero(), dy);
      product_sum = Vec::add(product_sum, Vec::select(Vec::less(value, Vec::zero()), negated, dy));
    });
    *magnitude = Vec::sum(magnitude_sum);
    *product = Vec::sum(product_sum);
  }

  template <class T>
  static void binarize_backward(const void* grad_raw, float scale, float mean_step, const void* x_raw, int64_t count,
                                void* grad_x_raw) {
    const T* grad = static_cast<const T*>(grad_raw);
    const T* x = static_cast<const T*>(x_raw);
    T* grad_x = static_cast<T*>(grad_x_raw);
    const F factor = Vec::set(scale);
    const F up = Vec::set(mean_step);
    const F down = Vec::set(-mean_step);
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const F value = load(x + i, n);
      const F dy = grad == nullptr ? Vec::zero() : Vec::mul(load(grad + i, n), factor);
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
