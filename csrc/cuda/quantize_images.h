// Images to int8 with one grid each, on a GPU, with their padding around them: what int8_conv2d multiplies.
//
// A warp or a block works on a line. Where the grid is dynamic, lines are read for their largest magnitudes first, of
// which an image's scale is made; where it is static, the same tells of NaN, and is found while lines are rounded.
#pragma once

#include "cuda/quantize_rows.h"
#include "cuda/windows.h"

namespace kdq::cuda {

// Bit patterns of magnitudes order as these do, and NaN > inf > finite.
KDQ_DEVICE uint32_t magnitude_bits(float value) { return bits_of(value) & 0x7FFFFFFFU; }
constexpr uint32_t kInfinityBits = 0x7F800000U;

// The largest magnitude of each row of x.
template <class T, int kTeam>
struct LargestOfRows {
  using Team = RowTeam<T, kTeam>;
  static constexpr int kThreads = Team::kThreads;
  static constexpr int kRows = Team::kRows;
  struct Shared {
    uint32_t largest[kThreads / kWarp];
  };

  const T* x;
  uint32_t* largest;
  int64_t rows;
  int64_t cols;
  bool wide;  // rows of x are multiples of 16

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t row = Team::row(thread);
    if (row >= rows) return;
    uint32_t own = 0;
    for (int64_t i = Team::first(thread); i < cols; i += Team::kStep) {
      float values[kChunk<T>];
      load_chunk(thread, x + row * cols + i, wide, cols - i, values);
      for (float value : values) own = Largest()(own, magnitude_bits(value));
    }
    own = Team::reduce(thread, shared.largest, own, Largest());
    if (Team::first(thread) == 0) thread.store(largest + row, own);
  }
};

// The scale of each image, from the largest magnitudes of its lines: that of the grid, or NaN where there is one. A
// block an image.
struct ImageScales {
  static constexpr int kThreads = 256;
  struct Shared {
    uint32_t largest[kThreads / kWarp];
  };

  const uint32_t* largest;
  float* scale;
  int64_t lines;  // of an image
  bool is_static;
  StaticGrid grid;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    uint32_t own = 0;
    for (int64_t i = thread.index(); i < lines; i += kThreads) {
      own = Largest()(own, thread.load(largest + thread.block() * lines + i));
    }
    own = reduce_block(thread, shared.largest, own, Largest());
    if (thread.index() != 0) return;
    const float of_grid = own > kInfinityBits ? NAN : grid.scale_in(thread);
    thread.store(scale + thread.block(), is_static ? of_grid : row_scale(own));
  }
};

// The grid of an image, in registers. Dynamic integers are symmetric; static ones have kStaticShift subtracted.
template <bool kStatic>
struct ImageGrid {
  float inverse;
  float zero_point;
  float quant_max;
  bool usable;

  KDQ_DEVICE int8_t integer(float x) const {
    if constexpr (kStatic) {
      return static_integer(x, inverse, zero_point, quant_max);
    } else {
      return usable ? row_integer(x, inverse) : int8_t{0};
    }
  }
};

// Lines of x to lines of padded images, padding included: it is what 0 becomes.
template <class T, bool kStatic, int kTeam>
struct QuantizeLines {
  using Team = RowTeam<T, kTeam>;
  static constexpr int kThreads = Team::kThreads;
  static constexpr int kRows = Team::kRows;
  struct Shared {
    uint32_t largest[kThreads / kWarp];
  };

  const T* x;
  int8_t* q;
  PaddedImages images;
  const float* scale;  // dynamic: of each image
  StaticGrid grid;     // static,
  uint32_t* largest;   // and then the largest magnitude of each line of x is written
  bool wide;           // the lines of x, and the padding at the left, are multiples of 16

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t row = Team::row(thread);
    if (row >= images.shape.images * images.lines()) return;
    const PaddedImages::Line line = images.line_at(row);
    const ImageGrid<kStatic> of_image = grid_of(thread, line.image);
    const int64_t cols = images.shape.width * images.shape.channels;
    const int64_t left = images.shape.padding_width * images.shape.channels;
    uint32_t own = 0;
    for (int64_t i = Team::first(thread); i < images.line_bytes; i += Team::kStep) {
      float values[kChunk<T>];
      load_inside(thread, line.row, i - left, cols, values);
      int8_t integers[kChunk<T>];
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        integers[e] = of_image.integer(values[e]);
        if constexpr (kStatic) own = Largest()(own, magnitude_bits(values[e]));
      }
      store_chunk(thread, q + row * images.line_bytes + i, true, kChunk<T>, integers);
    }
    if constexpr (kStatic) {
      own = Team::reduce(thread, shared.largest, own, Largest());
      if (line.row >= 0 && Team::first(thread) == 0) thread.store(largest + line.row, own);
    }
  }

 private:
  template <class Thread>
  KDQ_DEVICE ImageGrid<kStatic> grid_of(Thread& thread, int64_t image) const {
    if constexpr (kStatic) {
      return {1.0F / grid.scale_in(thread), static_cast<float>(grid.zero_point_in(thread)), grid.quant_max, true};
    } else {
      const float s = thread.load(scale + image);
      return {1.0F / s, 0.0F, 0.0F, is_finite(s)};
    }
  }

  // Elements at ... of a line of x; 0 for those that it does not have.
  template <class Thread>
  KDQ_DEVICE void load_inside(Thread& thread, int64_t row, int64_t at, int64_t cols, float (&values)[kChunk<T>]) const {
    using Bits = typename Element<T>::Bits;
    const T* line = x + row * cols;
    if (row >= 0 && wide && at >= 0 && at < cols) return load_chunk(thread, line + at, true, kChunk<T>, values);
    for (int e = 0; e < kChunk<T>; ++e) {
      const bool has = row >= 0 && at + e >= 0 && at + e < cols;
      values[e] = has ? Element<T>::widen(thread.load(reinterpret_cast<const Bits*>(line) + at + e)) : 0.0F;
    }
  }
};

// ---- for launching -------------------------------------------------------------------------------------------------

// Where quantized images are, in device memory.
struct QuantizedImages {
  int8_t* q;          // images.bytes(), a multiple of 16
  float* scale;       // [images]
  uint32_t* largest;  // [images * height], scratch
};

// grid: of static activations; nullptr for dynamic ones.
template <class Launcher>
Status launch_quantize_images(const Launcher& launcher, DType dtype, const void* x, const PaddedImages& images,
                              const StaticGrid* grid, const QuantizedImages& to) {
  const Conv2dShape& s = images.shape;
  const int64_t cols = s.width * s.channels;
  const ImageScales scales = {to.largest, to.scale, s.height, grid != nullptr, grid == nullptr ? StaticGrid{} : *grid};
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const T* values = static_cast<const T*>(x);
    const bool wide = rows_are_wide<T>(x, nullptr, 1, cols);
    const bool wide_inside = wide && s.padding_width * s.channels % kChunk<T> == 0;
    const auto largest = [&](auto team) {
      const LargestOfRows<T, team.value> kernel = {values, to.largest, s.images * s.height, cols, wide};
      return launcher.run(kernel, ceil_div(s.images * s.height, kernel.kRows));
    };
    const auto quantize = [&](auto team, auto is_static) {
      const QuantizeLines<T, is_static.value, team.value> kernel = {values,      to.q,       images,     to.scale,
                                                                    scales.grid, to.largest, wide_inside};
      return launcher.run(kernel, ceil_div(s.images * images.lines(), kernel.kRows));
    };
    if (grid != nullptr) {
      const Status status =
          with_row_team(images.line_bytes, [&](auto team) { return quantize(team, std::true_type()); });
      return status.ok() ? launcher.run(scales, s.images) : status;
    }
    Status status = with_row_team(cols, largest);
    if (status.ok()) status = launcher.run(scales, s.images);
    if (!status.ok()) return status;
    return with_row_team(images.line_bytes, [&](auto team) { return quantize(team, std::false_type()); });
  });
}

}  // namespace kdq::cuda
