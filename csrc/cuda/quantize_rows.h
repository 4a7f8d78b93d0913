// Quantization a row at a time on a GPU: quantize_rows, fake_quantize_rows, and the static form that int8_linear needs.
// A warp or a block reads a row twice, for its largest magnitude and to round it; the second time it comes from a
// cache.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "core/checks.h"
#include "cuda/reduce.h"

namespace kdq::cuda {

// Rows up to this length have a warp each, longer ones a block.
constexpr int64_t kWarpRow = 1024;

KDQ_DEVICE float row_scale(uint32_t largest_magnitude) {
  const float scale = float_of(largest_magnitude) / 127.0F;
  return scale < FLT_MIN ? FLT_MIN : scale;  // NaN passes
}

KDQ_DEVICE int8_t row_integer(float x, float inverse) {
  const float rounded = nearbyintf(x * inverse);
  return static_cast<int8_t>(static_cast<int32_t>(rounded < -127.0F ? -127.0F : rounded > 127.0F ? 127.0F : rounded));
}

// How a row is laid out over threads. kTeam: threads of a row, kWarp or kThreads.
template <class T, int kTeam>
struct RowTeam {
  static constexpr int kThreads = 256;
  static constexpr int kRows = kThreads / kTeam;  // of a block
  static constexpr int64_t kStep = int64_t{kTeam} * kChunk<T>;

  template <class Thread>
  static KDQ_DEVICE int64_t row(Thread& thread) {
    return thread.block() * kRows + thread.index() / kTeam;
  }
  // First element of this thread.
  template <class Thread>
  static KDQ_DEVICE int64_t first(Thread& thread) {
    return int64_t{thread.index() % kTeam} * kChunk<T>;
  }
  template <class V, class Thread, class Op>
  static KDQ_DEVICE V reduce(Thread& thread, V (&shared)[kThreads / kWarp], V value, Op op) {
    if constexpr (kTeam == kWarp) {
      return reduce_warp(thread, value, op);
    } else {
      return reduce_block(thread, shared, value, op);
    }
  }
};

// Y: int8_t, the integers; or T, what they stand for, and no scales are written.
template <class T, class Y, int kTeam>
struct QuantizeRows {
  using Team = RowTeam<T, kTeam>;
  static constexpr bool kIntegers = std::is_same<Y, int8_t>::value;
  static constexpr int kThreads = Team::kThreads;
  static constexpr int kRows = Team::kRows;
  struct Shared {
    uint32_t largest[kThreads / kWarp];
  };

  const T* x;
  Y* y;
  float* scale;
  int64_t rows;
  int64_t cols;
  bool wide;  // rows of x are multiples of 16, of y of a chunk's elements

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t row = Team::row(thread);
    if (row >= rows) return;
    const T* in = x + row * cols;
    float values[kChunk<T>];
    uint32_t largest = 0;  // bit patterns without the sign order as the magnitudes do, and NaN > inf > finite
    for (int64_t i = Team::first(thread); i < cols; i += Team::kStep) {
      load_chunk(thread, in + i, wide, cols - i, values);
      for (float value : values) largest = Largest()(largest, bits_of(value) & 0x7FFFFFFFU);
    }
    largest = Team::reduce(thread, shared.largest, largest, Largest());
    const float s = row_scale(largest);
    const float inverse = 1.0F / s;
    const bool usable = is_finite(s);
    if (kIntegers && Team::first(thread) == 0) thread.store(scale + row, s);
    for (int64_t i = Team::first(thread); i < cols; i += Team::kStep) {
      load_chunk(thread, in + i, wide, cols - i, values);
      int8_t integers[kChunk<T>];
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        integers[e] = usable ? row_integer(values[e], inverse) : int8_t{0};
        if constexpr (!kIntegers) values[e] = usable ? static_cast<float>(integers[e]) * s : NAN;
      }
      if constexpr (kIntegers) {
        store_chunk(thread, y + row * cols + i, wide, cols - i, integers);
      } else {
        store_floats(thread, y + row * cols + i, wide, cols - i, values);
      }
    }
  }
};

// The grid of static activations, whose numbers may be on the device.
struct StaticGrid {
  const float* scale_at;  // or nullptr: scale
  float scale;
  const int32_t* zero_point_at;  // or nullptr: zero_point
  int32_t zero_point;
  float quant_max;

  template <class Thread>
  KDQ_DEVICE float scale_in(Thread& thread) const {
    return scale_at == nullptr ? scale : thread.load(scale_at);
  }
  template <class Thread>
  KDQ_DEVICE int32_t zero_point_in(Thread& thread) const {
    return zero_point_at == nullptr ? zero_point : thread.load(zero_point_at);
  }
};

// What is subtracted from an unsigned activation to make it int8.
constexpr int32_t kStaticShift = 128;

KDQ_DEVICE int8_t static_integer(float x, float inverse, float zero_point, float quant_max) {
  const float rounded = nearbyintf(x * inverse) + zero_point;
  const float clamped = rounded > quant_max ? quant_max : rounded > 0.0F ? rounded : 0.0F;  // NaN: 0
  return static_cast<int8_t>(static_cast<int32_t>(clamped) - kStaticShift);
}

// x -> clamp(nearbyint(x / scale) + zero_point, 0, quant_max) - kStaticShift, and the scale of each row: that of the
// grid, or NaN where a row has one.
template <class T, int kTeam>
struct QuantizeRowsStatic {
  using Team = RowTeam<T, kTeam>;
  static constexpr int kThreads = Team::kThreads;
  static constexpr int kRows = Team::kRows;
  struct Shared {
    uint32_t has_nan[kThreads / kWarp];
  };

  const T* x;
  int8_t* q;
  float* scale;
  int64_t rows;
  int64_t cols;
  bool wide;  // rows of x are multiples of 16, of q of a chunk's elements
  StaticGrid grid;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t row = Team::row(thread);
    if (row >= rows) return;
    const float s = grid.scale_in(thread);
    const float inverse = 1.0F / s;
    const float zero_point = static_cast<float>(grid.zero_point_in(thread));
    uint32_t has_nan = 0;
    for (int64_t i = Team::first(thread); i < cols; i += Team::kStep) {
      float values[kChunk<T>];
      load_chunk(thread, x + row * cols + i, wide, cols - i, values);
      int8_t integers[kChunk<T>];
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        has_nan |= is_nan(values[e]) ? 1U : 0U;
        integers[e] = static_integer(values[e], inverse, zero_point, grid.quant_max);
      }
      store_chunk(thread, q + row * cols + i, wide, cols - i, integers);
    }
    has_nan = Team::reduce(thread, shared.has_nan, has_nan, Largest());
    if (Team::first(thread) == 0) thread.store(scale + row, has_nan != 0 ? NAN : s);
  }
};

// launch(team) with team.value the threads of a row.
template <class Launch>
Status with_row_team(int64_t cols, Launch&& launch) {
  if (cols <= kWarpRow) return launch(std::integral_constant<int, kWarp>());
  return launch(std::integral_constant<int, 256>());
}

// Whether rows of x, and of a result of that element size, allow accesses to whole chunks.
template <class T>
bool rows_are_wide(const void* x, const void* y, size_t y_element, int64_t cols) {
  const size_t y_bytes = y_element * kChunk<T>;
  return is_aligned(x, 16) && is_aligned(y, y_bytes < 16 ? y_bytes : 16) && cols % kChunk<T> == 0;
}

inline Status check_rows(const void* x, int64_t rows, int64_t cols, const char* y_name, const void* y) {
  if (rows < 0 || cols < 0) return Status::invalid("x: expected sizes of at least 0");
  const Status status = check_pointer("x", x, rows * cols);
  return status.ok() ? check_pointer(y_name, y, rows * cols) : status;
}

template <class Launcher>
Status launch_quantize_rows(const Launcher& launcher, DType dtype, const void* x, int64_t rows, int64_t cols, int8_t* q,
                            float* scale) {
  Status status = check_rows(x, rows, cols, "q", q);
  if (status.ok()) status = check_pointer("scale", scale, rows);
  if (!status.ok()) return status;
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return with_row_team(cols, [&](auto team) {
      const QuantizeRows<T, int8_t, team.value> kernel = {static_cast<const T*>(x),       q, scale, rows, cols,
                                                          rows_are_wide<T>(x, q, 1, cols)};
      return launcher.run(kernel, ceil_div(rows, kernel.kRows));
    });
  });
}

template <class Launcher>
Status launch_fake_quantize_rows(const Launcher& launcher, DType dtype, const void* x, int64_t rows, int64_t cols,
                                 void* y) {
  const Status status = check_rows(x, rows, cols, "y", y);
  if (!status.ok()) return status;
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return with_row_team(cols, [&](auto team) {
      const QuantizeRows<T, T, team.value> kernel = {
          static_cast<const T*>(x), static_cast<T*>(y), nullptr, rows, cols, rows_are_wide<T>(x, y, sizeof(T), cols)};
      return launcher.run(kernel, ceil_div(rows, kernel.kRows));
    });
  });
}

template <class Launcher>
Status launch_quantize_rows_static(const Launcher& launcher, DType dtype, const void* x, int64_t rows, int64_t cols,
                                   const StaticGrid& grid, int8_t* q, float* scale) {
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return with_row_team(cols, [&](auto team) {
      const QuantizeRowsStatic<T, team.value> kernel = {static_cast<const T*>(x),        q,   scale, rows, cols,
                                                        rows_are_wide<T>(x, q, 1, cols), grid};
      return launcher.run(kernel, ceil_div(rows, kernel.kRows));
    });
  });
}

}  // namespace kdq::cuda
