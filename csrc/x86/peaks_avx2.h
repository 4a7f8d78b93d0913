// Peak loops that all AVX2 levels share: xor + popcount, and float32.
#pragma once

#include <immintrin.h>

#include "core/peaks_kernels.h"
#include "x86/peaks_simd.h"

namespace kdq {
namespace {

// xor, then the half-byte table of binary_gemm_avx2.cpp; vpsadbw, once in 31 words, is left out.
struct Binary {
  using Vector = __m256i;
  static constexpr int kSums = 8;
  static constexpr double kOperations = 512;
  static Vector initial(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static void step(Vector& sum, Vector a, Vector b) {
    Vector low;
    Vector high;
    const Vector mask = _mm256_set1_epi8(15);
    const Vector table = _mm256_set1_epi8(1);
    __asm__ volatile(
        "vpxor %3, %4, %1\n\t"
        "vpsrld $4, %1, %2\n\t"
        "vpand %5, %1, %1\n\t"
        "vpand %5, %2, %2\n\t"
        "vpshufb %1, %6, %1\n\t"
        "vpshufb %2, %6, %2\n\t"
        "vpaddb %1, %2, %1\n\t"
        "vpaddb %1, %0, %0"
        : "+x"(sum), "=&x"(low), "=&x"(high)
        : "x"(a), "x"(b), "x"(mask), "x"(table));
  }
};

struct Float32 {
  using Vector = __m256;
  static constexpr int kSums = 12;
  static constexpr double kOperations = 16;
  static Vector initial(int value) { return _mm256_set1_ps(static_cast<float>(value)); }
  static void step(Vector& sum, Vector a, Vector b) {
    __asm__ volatile("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(a), "x"(b));
  }
};

}  // namespace
}  // namespace kdq
