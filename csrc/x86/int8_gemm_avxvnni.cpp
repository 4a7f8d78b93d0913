// The int8 family on AVX2 with AVX-VNNI: vpdpbusd as in int8_gemm_avx512vnni.cpp, which explains the offset, on YMM
// registers. For client CPUs, which have no AVX-512.
#include "core/int8_gemm_kernels.h"
#include "x86/vec_avx2.h"

namespace kdq {
namespace {

struct Dot {
  using Prepared = uint8_t;
  static constexpr int kUnit = 4;
  static constexpr int kOffset = 128;
  // 12 sums, 2 weight vectors, 1 broadcast: 15 of 16 registers.
  static constexpr int kRows = 6;
  static constexpr int kCols = 2;

  static __m256i load_weights(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  template <int kBits, int kShare>
  static __m256i load_few_bits(const int8_t* p) {
    return _mm256_and_si256(
        _mm256_slli_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 8 - kBits * (kShare + 1)),
        _mm256_set1_epi8(top_bits(kBits)));
  }
  static __m256i dot(__m256i sum, __m256i a, __m256i w) { return _mm256_dpbusd_avx_epi32(sum, a, w); }
};

}  // namespace
}  // namespace kdq

#include "x86/int8_gemm_simd.h"

namespace kdq {

extern const Int8Kernels kInt8AvxVnni = make_int8_kernels<Loops>(kTile);

}  // namespace kdq
