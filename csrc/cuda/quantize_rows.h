// quantize_rows on a GPU: a warp or a block reads a row twice, for its largest magnitude and to round it; the second
// time it comes from a cache.
#pragma once

#include <cfloat>
#include <cmath>

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

// kTeam: threads of a row, kWarp or kThreads.
template <class T, int kTeam>
struct QuantizeRows {
  static constexpr int kThreads = 256;
  static constexpr int kRows = kThreads / kTeam;  // of a block
  struct Shared {
    uint32_t largest[kThreads / kWarp];
  };

  const T* x;
  int8_t* q;
  float* scale;
  int64_t rows;
  int64_t cols;
  bool wide;  // rows of x are multiples of 16, of q of a chunk's elements

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t row = thread.block() * kRows + thread.index() / kTeam;
    if (row >= rows) return;
    const T* in = x + row * cols;
    const int lane = thread.index() % kTeam;
    float values[kChunk<T>];
    uint32_t largest = 0;  // bit patterns without the sign order as the magnitudes do, and NaN > inf > finite
    for (int64_t i = int64_t{lane} * kChunk<T>; i < cols; i += kTeam * kChunk<T>) {
      load_chunk(thread, in + i, wide, cols - i, values);
      for (float value : values) largest = Largest()(largest, bits_of(value) & 0x7FFFFFFFU);
    }
    if constexpr (kTeam == kWarp) {
      largest = reduce_warp(thread, largest, Largest());
    } else {
      largest = reduce_block(thread, shared.largest, largest, Largest());
    }
    const float s = row_scale(largest);
    const float inverse = 1.0F / s;
    const bool usable = is_finite(s);
    if (lane == 0) thread.store(scale + row, s);
    for (int64_t i = int64_t{lane} * kChunk<T>; i < cols; i += kTeam * kChunk<T>) {
      load_chunk(thread, in + i, wide, cols - i, values);
      int8_t integers[kChunk<T>];
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) integers[e] = usable ? row_integer(values[e], inverse) : int8_t{0};
      store_chunk(thread, q + row * cols + i, wide, cols - i, integers);
    }
  }
};

template <class T, int kTeam, class Launcher>
Status launch_rows(const Launcher& launcher, const void* x, int64_t rows, int64_t cols, int8_t* q, float* scale) {
  const bool wide = is_aligned(x, 16) && is_aligned(q, kChunk<T>) && cols % kChunk<T> == 0;
  const QuantizeRows<T, kTeam> kernel = {static_cast<const T*>(x), q, scale, rows, cols, wide};
  return launcher.run(kernel, ceil_div(rows, kernel.kRows));
}

template <class Launcher>
Status launch_quantize_rows(const Launcher& launcher, DType dtype, const void* x, int64_t rows, int64_t cols, int8_t* q,
                            float* scale) {
  if (rows < 0 || cols < 0) return Status::invalid("x: expected sizes of at least 0");
  Status status = check_pointer("x", x, rows * cols);
  if (status.ok()) status = check_pointer("q", q, rows * cols);
  if (status.ok()) status = check_pointer("scale", scale, rows);
  if (!status.ok()) return status;
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    if (cols <= kWarpRow) return launch_rows<T, kWarp>(launcher, x, rows, cols, q, scale);
    return launch_rows<T, 256>(launcher, x, rows, cols, q, scale);
  });
}

}  // namespace kdq::cuda
