// The int8 family on AVX2: vpmaddwd on 16-bit operands.
//
// vpmaddubsw would do twice as many products an instruction, but saturates on full-range data; keeping it exact needs a
// sign trick that costs the gain again (4 instructions for 32 products either way). Weights stay 8 bits in memory and
// are widened as they are loaded, twice a step against twelve dot products.
#include "core/int8_gemm_kernels.h"
#include "x86/vec_avx2.h"

namespace kdq {
namespace {

struct Dot {
  using Prepared = int16_t;
  static constexpr int kUnit = 2;
  static constexpr int kOffset = 0;
  // 12 sums, 2 weight vectors, 1 broadcast, 1 product: all 16 registers.
  static constexpr int kRows = 6;
  static constexpr int kCols = 2;

  static __m256i load_weights(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <int kBits, int kShare>
  static __m256i load_few_bits(const int8_t* p) {
    return _mm256_cvtepi8_epi16(
        _mm_and_si128(_mm_slli_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), 8 - kBits * (kShare + 1)),
                      _mm_set1_epi8(top_bits(kBits))));
  }
  static __m256i dot(__m256i sum, __m256i a, __m256i w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, w)); }
};

}  // namespace
}  // namespace kdq

#include "x86/int8_gemm_simd.h"

namespace kdq {

extern const Int8Kernels kInt8Avx2 = make_int8_kernels<Loops>(kTile);

}  // namespace kdq
