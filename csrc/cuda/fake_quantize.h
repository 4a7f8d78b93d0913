// fake_quantize, quantize and dequantize on a GPU: memory-bound, a thread reads, rounds and writes one chunk, of 16
// bytes where the elements are floats.
#pragma once

#include "cuda/quant_grid.h"

namespace kdq::cuda {

// What is stored for the clamped integer q (or NaN). Y an integer type: the integer.
template <class T, class Y>
struct Quantized {
  using Bits = Y;
  static KDQ_DEVICE Bits of(const Grid& grid, float q) {
    return static_cast<Bits>(static_cast<int32_t>(is_nan(q) ? grid.zero_point : q));
  }
};

// Y = T: the value it stands for.
template <class T>
struct Quantized<T, T> {
  using Bits = typename Element<T>::Bits;
  static KDQ_DEVICE Bits of(const Grid& grid, float q) { return Element<T>::narrow(grid.dequantized(q)); }
};

template <class T, class Y>
struct FakeQuantize {
  using Output = Quantized<T, Y>;
  using Bits = typename Output::Bits;
  static constexpr int kThreads = 256;
  static constexpr int64_t kElements = int64_t{kThreads} * kChunk<T>;  // of a block
  static constexpr size_t kAlignment = sizeof(Bits) * kChunk<T> < 16 ? sizeof(Bits) * kChunk<T> : 16;
  struct Shared {};

  const T* x;
  Bits* y;
  int64_t n;
  bool wide;  // x is a multiple of 16, y of kAlignment
  GridView grid;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t first = thread.block() * kElements + thread.index() * kChunk<T>;
    if (first >= n) return;
    float values[kChunk<T>];
    load_chunk(thread, x + first, wide, n - first, values);
    GridCursor<Thread> cursor(thread, grid, first);
    Bits results[kChunk<T>] = {};
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      if (first + i >= n) continue;
      const Grid& g = cursor.next();
      results[i] = Output::of(g, g.clamp(g.unclamped(values[i])));
    }
    store_chunk(thread, y + first, wide, n - first, results);
  }
};

template <class Q>
struct Dequantize {
  static constexpr int kThreads = 256;
  static constexpr int kCount = kChunk<float>;
  static constexpr int64_t kElements = int64_t{kThreads} * kCount;  // of a block
  struct Shared {};

  const Q* q;
  float* y;
  int64_t n;
  bool wide;  // q is a multiple of a chunk's size, y of 16
  GridView grid;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t first = thread.block() * kElements + thread.index() * kCount;
    if (first >= n) return;
    Q integers[kCount];
    if (wide && n - first >= kCount) {
      using Packet = Words<kCount * sizeof(Q)>;
      const Packet words = thread.load(reinterpret_cast<const Packet*>(q + first));
      memcpy(integers, &words, sizeof(integers));
    } else {
      for (int i = 0; i < kCount; ++i) integers[i] = first + i < n ? thread.load(q + first + i) : Q{0};
    }
    GridCursor<Thread> cursor(thread, grid, first);
    float values[kCount] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i < n) values[i] = cursor.next().dequantized(static_cast<float>(integers[i]));
    }
    store_floats(thread, y + first, wide, n - first, values);
  }
};

template <class T, class Y, class Launcher>
Status launch_quantized(const Launcher& launcher, const void* x, void* y, const QuantShape& shape,
                        const QuantGrid& grid) {
  using Kernel = FakeQuantize<T, Y>;
  const int64_t n = shape.outer * shape.channels * shape.inner;
  const bool wide = is_aligned(x, 16) && is_aligned(y, Kernel::kAlignment);
  const Kernel kernel = {static_cast<const T*>(x), static_cast<typename Kernel::Bits*>(y), n, wide,
                         view_of(shape, grid)};
  return launcher.run(kernel, ceil_div(n, Kernel::kElements));
}

template <class Launcher>
Status launch_fake_quantize(const Launcher& launcher, DType dtype, const void* x, void* y, const QuantShape& shape,
                            const QuantGrid& grid) {
  const Status status = check_quant_call(shape, grid, "x", x, "y", y);
  if (!status.ok()) return status;
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return launch_quantized<T, T>(launcher, x, y, shape, grid);
  });
}

template <class Launcher>
Status launch_quantize(const Launcher& launcher, DType dtype, const void* x, QType qtype, void* q,
                       const QuantShape& shape, const QuantGrid& grid) {
  Status status = check_quant_call(shape, grid, "x", x, "q", q);
  if (status.ok()) status = check_fits(qtype, grid);
  if (!status.ok()) return status;
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    if (qtype == QType::kInt8) return launch_quantized<T, int8_t>(launcher, x, q, shape, grid);
    if (qtype == QType::kUInt8) return launch_quantized<T, uint8_t>(launcher, x, q, shape, grid);
    return launch_quantized<T, int32_t>(launcher, x, q, shape, grid);
  });
}

template <class Launcher>
Status launch_dequantize(const Launcher& launcher, QType qtype, const void* q, float* y, const QuantShape& shape,
                         const QuantGrid& grid) {
  const Status status = check_quant_call(shape, grid, "q", q, "y", y);
  if (!status.ok()) return status;
  const int64_t n = shape.outer * shape.channels * shape.inner;
  const auto launch = [&](auto integer) {
    using Q = decltype(integer);
    const bool wide = is_aligned(q, sizeof(Q) * kChunk<float>) && is_aligned(y, 16);
    const Dequantize<Q> kernel = {static_cast<const Q*>(q), y, n, wide, view_of(shape, grid)};
    return launcher.run(kernel, ceil_div(n, kernel.kElements));
  };
  if (qtype == QType::kInt8) return launch(int8_t{});
  if (qtype == QType::kUInt8) return launch(uint8_t{});
  return launch(int32_t{});
}

}  // namespace kdq::cuda
