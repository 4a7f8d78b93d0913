// pack_signs and unpack_signs on a GPU. A thread makes or reads a byte, eight signs: on little-endian machines byte b
// of a row has the elements from 8 b on, and no thread needs another.
#pragma once

#include "core/checks.h"
#include "cuda/elements.h"
#include "kdq/binary_gemm.h"

namespace kdq::cuda {

constexpr int kByte = 8;

// The signs of the first `count` elements at x, at most 8; the other bits are 0. wide: x is a multiple of 16.
template <class T, class Thread>
KDQ_DEVICE uint8_t sign_byte(Thread& thread, const T* x, bool wide, int64_t count) {
  uint32_t byte = 0;
#pragma unroll
  for (int c = 0; c < kByte; c += kChunk<T>) {
    float values[kChunk<T>];
    load_chunk(thread, x + c, wide, count - c, values);
    for (int i = 0; i < kChunk<T>; ++i) byte |= static_cast<uint32_t>(values[i] < 0.0F) << (c + i);
  }
  return static_cast<uint8_t>(byte);
}

template <class T>
struct PackSigns {
  static constexpr int kThreads = 256;
  struct Shared {};

  const T* x;
  uint8_t* bits;
  int64_t rows;
  int64_t k;
  int64_t bytes;  // of a row of bits
  bool wide;      // rows of x are multiples of 16

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t own = thread.block() * kThreads + thread.index();
    const int64_t row = own / bytes;
    if (row >= rows) return;
    const int64_t first = (own - row * bytes) * kByte;
    thread.store(bits + own, sign_byte(thread, x + row * k + first, wide, k - first));
  }
};

struct UnpackSigns {
  static constexpr int kThreads = 256;
  struct Shared {};

  const uint8_t* bits;
  float* x;
  int64_t rows;
  int64_t k;
  int64_t bytes;  // of a row of bits
  bool wide;      // rows of x are multiples of 16

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t own = thread.block() * kThreads + thread.index();
    const int64_t row = own / bytes;
    if (row >= rows) return;
    const int64_t first = (own - row * bytes) * kByte;
    const uint32_t byte = thread.load(bits + own);
#pragma unroll
    for (int c = 0; c < kByte; c += kChunk<float>) {
      float values[kChunk<float>];
      for (int i = 0; i < kChunk<float>; ++i) values[i] = (byte >> (c + i) & 1U) != 0 ? -1.0F : 1.0F;
      store_floats(thread, x + row * k + first + c, wide, k - first - c, values);
    }
  }
};

inline Status check_signs(const void* x, int64_t rows, int64_t k, const uint64_t* bits) {
  if (rows < 0 || k < 0) return Status::invalid("rows, k: expected at least 0");
  const Status status = check_pointer("x", x, rows * k);
  return status.ok() ? check_pointer("bits", bits, rows * k) : status;
}

template <class Launcher>
Status launch_pack_signs(const Launcher& launcher, DType dtype, const void* x, int64_t rows, int64_t k,
                         uint64_t* bits) {
  const Status status = check_signs(x, rows, k, bits);
  if (!status.ok()) return status;
  const int64_t bytes = binary_words(k) * static_cast<int64_t>(sizeof(uint64_t));
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = is_aligned(x, 16) && k % kChunk<T> == 0;
    const PackSigns<T> kernel = {static_cast<const T*>(x), reinterpret_cast<uint8_t*>(bits), rows, k, bytes, wide};
    return launcher.run(kernel, ceil_div(rows * bytes, kernel.kThreads));
  });
}

template <class Launcher>
Status launch_unpack_signs(const Launcher& launcher, const uint64_t* bits, int64_t rows, int64_t k, float* x) {
  const Status status = check_signs(x, rows, k, bits);
  if (!status.ok()) return status;
  const int64_t bytes = binary_words(k) * static_cast<int64_t>(sizeof(uint64_t));
  const bool wide = is_aligned(x, 16) && k % kChunk<float> == 0;
  const UnpackSigns kernel = {reinterpret_cast<const uint8_t*>(bits), x, rows, k, bytes, wide};
  return launcher.run(kernel, ceil_div(rows * bytes, kernel.kThreads));
}

}  // namespace kdq::cuda
