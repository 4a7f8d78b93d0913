// The int8 family on AVX-512 VNNI: vpdpbusd sums four products of u8 activations and s8 weights into int32.
//
// Signed activations become u8 by adding 128; the epilogue takes 128 * (sum of the channel's weights) off again. Sums
// wrap modulo 2^32 on the way, which leaves the final difference exact: it fits int32 by the bound on K.
#include "core/int8_gemm_kernels.h"
#include "x86/vec_avx512.h"

namespace kdq {
namespace {

struct Dot {
  using Prepared = uint8_t;
  static constexpr int kUnit = 4;
  static constexpr int kOffset = 128;
  // 24 sums, 4 weight vectors, 1 broadcast: 29 of 32 registers.
  static constexpr int kRows = 6;
  static constexpr int kCols = 4;

  static __m512i load_weights(const int8_t* p) { return _mm512_loadu_si512(p); }
  template <int kBits, int kShare>
  static __m512i load_few_bits(const int8_t* p) {
    return _mm512_and_si512(_mm512_slli_epi16(_mm512_loadu_si512(p), 8 - kBits * (kShare + 1)),
                            _mm512_set1_epi8(top_bits(kBits)));
  }
  static __m512i dot(__m512i sum, __m512i a, __m512i w) { return _mm512_dpbusd_epi32(sum, a, w); }
};

}  // namespace
}  // namespace kdq

#include "x86/int8_gemm_simd.h"

namespace kdq {

extern const Int8Kernels kInt8Avx512Vnni = make_int8_kernels<Loops>(kTile);

}  // namespace kdq
