// 16-bit floats as tensor cores multiply them: in pairs, the first in the lower half of a word. They are made of int8
// without rounding, and of float32 as terms whose sum stands for it.
#pragma once

#include <cmath>

#include "cuda/elements.h"

namespace kdq::cuda {

// Four of eight bytes, by the hexadecimal digits of `which`, the last one's first: 0 to 3 are bytes of low, 4 to 7 of
// high.
KDQ_DEVICE uint32_t choose_bytes(uint32_t low, uint32_t high, uint32_t which) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, which);
#else
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (which >> 4 * i & 7U) * 8 & 255U) << 8 * i;
  return result;
#endif
}

KDQ_DEVICE uint32_t pair_lower_halves(uint32_t first, uint32_t second) { return choose_bytes(first, second, 0x5410); }
KDQ_DEVICE uint32_t pair_upper_halves(uint32_t first, uint32_t second) { return choose_bytes(first, second, 0x7632); }

// What the terms after `term` stand for. An infinity needs no more than one.
KDQ_DEVICE float rest_of(float value, float term) { return fabsf(value) == INFINITY ? 0.0F : value - term; }

// A pair plus a pair, where the GPU has no instruction.
template <class Half>
uint32_t add_pairs(uint32_t a, uint32_t b) {
  using E = Element<Half>;
  const auto add = [](uint32_t x, uint32_t y) {
    return static_cast<uint32_t>(E::narrow(E::widen(static_cast<uint16_t>(x)) + E::widen(static_cast<uint16_t>(y))));
  };
  return add(a >> 16, b >> 16) << 16 | add(a & 0xFFFFU, b & 0xFFFFU);
}

// mma; from_int8: four int8 as two pairs, exactly; term: the first of a float's terms; scale_for: a power of two that
// brings floats up to `largest` into the range of two terms.
template <class Half>
struct Pairs;

template <>
struct Pairs<BFloat16> {
  template <class Thread>
  static KDQ_DEVICE void mma(Thread& thread, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    thread.mma_bf16(c, a, b);
  }

  // A bfloat16 with the upper byte 0x43 is 128 plus its lowest 7 bits, or, where bit 7 is set, 256 and more. So 128
  // plus the byte's low bits, minus 128 or, where its sign is set, 256.
  static KDQ_DEVICE void from_int8(uint32_t bytes, uint32_t (&pairs)[2]) {
    const uint32_t low = bytes & 0x7F7F7F7FU;
    const uint32_t sign = bytes & 0x80808080U;
    pairs[0] = add(choose_bytes(low, 0x43434343U, 0x4140), choose_bytes(sign, 0xC3C3C3C3U, 0x4140));
    pairs[1] = add(choose_bytes(low, 0x43434343U, 0x4342), choose_bytes(sign, 0xC3C3C3C3U, 0x4342));
  }

  // Cut, not rounded: the rest has no more bits than it must, and nothing overflows.
  static KDQ_DEVICE uint16_t term(float value) { return static_cast<uint16_t>(bits_of(value) >> 16); }
  static KDQ_DEVICE float scale_for(float) { return 1.0F; }

 private:
  static KDQ_DEVICE uint32_t add(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint32_t sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80U), "r"(b));  // sm_80 has no add
    return sum;
#else
    return add_pairs<BFloat16>(a, b);
#endif
  }
};

template <>
struct Pairs<Float16> {
  template <class Thread>
  static KDQ_DEVICE void mma(Thread& thread, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    thread.mma_f16(c, a, b);
  }

  // A float16 with the upper byte 0x64 is 1024 plus its lower byte. With the sign bit flipped that byte is value + 128;
  // 0xE480 is -(1024 + 128).
  static KDQ_DEVICE void from_int8(uint32_t bytes, uint32_t (&pairs)[2]) {
    const uint32_t shifted = bytes ^ 0x80808080U;
    pairs[0] = add(choose_bytes(shifted, 0x64646464U, 0x4140), 0xE480E480U);
    pairs[1] = add(choose_bytes(shifted, 0x64646464U, 0x4342), 0xE480E480U);
  }

  static KDQ_DEVICE uint16_t term(float value) { return Element<Float16>::narrow(value); }

  // `largest` is to lie from 2^14 on, below 2^15, as far as a float32 has that power of two and its inverse.
  static KDQ_DEVICE float scale_for(float largest) {
    const uint32_t exponent = bits_of(largest) >> 23;  // 127 for 1
    return float_of((exponent < 15 ? 253 : 268 - exponent) << 23);
  }

 private:
  static KDQ_DEVICE uint32_t add(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint32_t sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
#else
    return add_pairs<Float16>(a, b);
#endif
  }
};

// Two terms of a float: the first in the lower half, the other in the upper.
template <class Half>
KDQ_DEVICE uint32_t two_terms(float value) {
  const uint16_t first = Pairs<Half>::term(value);
  const uint16_t second = Element<Half>::narrow(rest_of(value, Element<Half>::widen(first)));
  return static_cast<uint32_t>(second) << 16 | first;
}

}  // namespace kdq::cuda
