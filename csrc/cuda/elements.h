// Elements in memory and as float32: conversions, and chunks of 16 bytes, which is what a thread reads at once.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/elements.h"
#include "cuda/thread.h"
#include "kdq/status.h"
#include "kdq/types.h"

namespace kdq::cuda {

KDQ_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

KDQ_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

KDQ_DEVICE bool is_nan(float value) { return value != value; }
KDQ_DEVICE bool is_finite(float value) { return (bits_of(value) & 0x7F800000U) != 0x7F800000U; }

// widen: exact. narrow: half-to-even, a NaN stays a NaN. Where the GPU has an instruction, the other branch computes
// the same for the tests.
template <class T>
struct Element;

template <>
struct Element<float> {
  using Bits = uint32_t;
  static KDQ_DEVICE float widen(Bits bits) { return float_of(bits); }
  static KDQ_DEVICE Bits narrow(float value) { return bits_of(value); }
};

template <>
struct Element<BFloat16> {
  using Bits = uint16_t;
  static KDQ_DEVICE float widen(Bits bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
  static KDQ_DEVICE Bits narrow(float value) {
#if defined(__CUDA_ARCH__)
    Bits bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = is_nan(value) ? bits | 0x400000U : bits + 0x7FFFU + ((bits >> 16) & 1U);
    return static_cast<Bits>(rounded >> 16);
#endif
  }
};

template <>
struct Element<Float16> {
  using Bits = uint16_t;
  static KDQ_DEVICE float widen(Bits bits) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    const uint32_t sign = (bits & 0x8000U) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFFU) << 13;
    if (magnitude >= 0x0F800000U) return float_of(sign | 0x70000000U | magnitude);  // inf, NaN
    return float_of(sign | bits_of(float_of(magnitude) * 0x1p112F));  // moves the exponent, denormals included
#endif
  }
  static KDQ_DEVICE Bits narrow(float value) {
#if defined(__CUDA_ARCH__)
    Bits bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    const uint32_t sign = (bits_of(value) >> 16) & 0x8000U;
    const uint32_t magnitude = bits_of(value) & 0x7FFFFFFFU;
    if (magnitude > 0x7F800000U) return static_cast<Bits>(sign | 0x7E00U);   // NaN
    if (magnitude >= 0x477FF000U) return static_cast<Bits>(sign | 0x7C00U);  // 65520 and more: inf
    if (magnitude < 0x38800000U) {  // below 2^-14: the sum's last bit is worth 2^-24, so the addition rounds
      return static_cast<Bits>(sign | (bits_of(float_of(magnitude) + 0.5F) - 0x3F000000U));
    }
    return static_cast<Bits>(sign | ((magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13));
#endif
  }
};

// Integers are stored as they are.
template <>
struct Element<int32_t> {
  using Bits = int32_t;
  static KDQ_DEVICE Bits narrow(int32_t value) { return value; }
};

// kBytes (4, 8 or 16) that are read or written at once.
template <int kBytes>
struct alignas(kBytes) Words {
  uint32_t word[kBytes / 4];
};

template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// The first `count` elements at x, at most a chunk, as float32; the others are 0. wide: x is a multiple of 16.
template <class T, class Thread>
KDQ_DEVICE void load_chunk(Thread& thread, const T* x, bool wide, int64_t count, float (&values)[kChunk<T>]) {
  using Bits = typename Element<T>::Bits;
  Bits bits[kChunk<T>];
  if (wide && count >= kChunk<T>) {
    const Words<16> words = thread.load(reinterpret_cast<const Words<16>*>(x));
    memcpy(bits, &words, sizeof(bits));
  } else {
    for (int i = 0; i < kChunk<T>; ++i)
      bits[i] = i < count ? thread.load(reinterpret_cast<const Bits*>(x) + i) : Bits{0};
  }
  for (int i = 0; i < kChunk<T>; ++i) values[i] = Element<T>::widen(bits[i]);
}

// Writes the first `count` of kCount values, integers or the bits of floats. wide: y is a multiple of 16, or of the
// size of all values if that is less.
template <int kCount, class V, class Thread>
KDQ_DEVICE void store_chunk(Thread& thread, V* y, bool wide, int64_t count, const V (&values)[kCount]) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(V));
  constexpr int kAtOnce = kBytes < 16 ? kBytes : 16;
  if (wide && count >= kCount) {
    Words<kAtOnce> words[kBytes / kAtOnce];
    memcpy(words, values, sizeof(words));
    for (int i = 0; i < kBytes / kAtOnce; ++i) thread.store(reinterpret_cast<Words<kAtOnce>*>(y) + i, words[i]);
  } else {
    for (int i = 0; i < kCount; ++i) {
      if (i < count) thread.store(y + i, values[i]);
    }
  }
}

template <class T, class Thread>
KDQ_DEVICE void store_floats(Thread& thread, T* y, bool wide, int64_t count, const float (&values)[kChunk<T>]) {
  using Bits = typename Element<T>::Bits;
  Bits bits[kChunk<T>];
  for (int i = 0; i < kChunk<T>; ++i) bits[i] = Element<T>::narrow(values[i]);
  store_chunk(thread, reinterpret_cast<Bits*>(y), wide, count, bits);
}

// A single element, of a dtype that is known only at run time.
template <class Thread>
KDQ_DEVICE void store_as(Thread& thread, DType dtype, void* y, int64_t at, float value) {
  if (dtype == DType::kFloat32) {
    thread.store(static_cast<float*>(y) + at, value);
  } else {
    const uint16_t bits = dtype == DType::kFloat16 ? Element<Float16>::narrow(value) : Element<BFloat16>::narrow(value);
    thread.store(static_cast<uint16_t*>(y) + at, bits);
  }
}

// body(y) with y a pointer to elements of dtype.
template <class Body>
KDQ_DEVICE void with_elements(DType dtype, void* y, const Body& body) {
  if (dtype == DType::kFloat32) {
    body(static_cast<float*>(y));
  } else if (dtype == DType::kBFloat16) {
    body(static_cast<BFloat16*>(y));
  } else {
    body(static_cast<Float16*>(y));
  }
}

// ---- for launching -------------------------------------------------------------------------------------------------

inline bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(T()) for the element type of dtype.
template <class Body>
Status for_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float());
    case DType::kBFloat16:
      return body(BFloat16());
    case DType::kFloat16:
      return body(Float16());
  }
  return Status::invalid("dtype: expected float32, bfloat16 or float16");
}

}  // namespace kdq::cuda
