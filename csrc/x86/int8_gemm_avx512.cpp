// The int8 family on AVX-512 without VNNI: vpmaddwd as in int8_gemm_avx2.cpp, on twice the width and registers.
#include "core/int8_gemm_kernels.h"
#include "x86/vec_avx512.h"

namespace kdq {
namespace {

struct Dot {
  using Prepared = int16_t;
  static constexpr int kUnit = 2;
  static constexpr int kOffset = 0;
  // 24 sums, 4 weight vectors, 1 broadcast, 1 product: 30 of 32 registers.
  static constexpr int kRows = 6;
  static constexpr int kCols = 4;

  static __m512i load_weights(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <int kBits, int kShare>
  static __m512i load_few_bits(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_and_si256(
        _mm256_slli_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 8 - kBits * (kShare + 1)),
        _mm256_set1_epi8(top_bits(kBits))));
  }
  static __m512i dot(__m512i sum, __m512i a, __m512i w) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, w)); }
};

}  // namespace
}  // namespace kdq

#include "x86/int8_gemm_simd.h"

namespace kdq {

extern const Int8Kernels kInt8Avx512 = make_int8_kernels<Loops>(kTile);

}  // namespace kdq
