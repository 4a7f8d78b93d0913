// The binary family on AVX-512 without VPOPCNTDQ: the half-byte table of binary_gemm_avx2.cpp in 512 bits.
#include "x86/interleave_words.h"
#include "x86/vec_avx512.h"

namespace kdq {
namespace {

struct Bits {
  using Words = __m512i;
  using Word = uint64_t;
  static constexpr int kLanes = 8;
  static constexpr int64_t kFlush = 31;
  // 16 sums, 4 weight vectors, 1 broadcast, table, mask, and 3 for the count in flight: 26 of 32 registers.
  static constexpr int kRows = 4;
  static constexpr int kCols = 2;

  static Words zero() { return _mm512_setzero_si512(); }
  static Words load(const Word* p) { return _mm512_loadu_si512(p); }
  static Words set(Word word) { return _mm512_set1_epi64(static_cast<long long>(word)); }
  static Words differ(Words a, Words b) { return _mm512_xor_si512(a, b); }

  static Words add(Words sum, Words v) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(v, mask));
    const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi32(v, 4), mask));
    return _mm512_add_epi8(sum, _mm512_add_epi8(low, high));
  }
  static Words add_widened(Words total, Words sum) { return _mm512_add_epi64(total, _mm512_sad_epu8(sum, zero())); }

  // The low halves of two vectors of words.
  static __m512i narrow(Words a, Words b) {
    const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_epi32(a, low, b);
  }
  static int64_t sum_lanes(Words total) { return _mm512_reduce_add_epi64(total); }

  static void interleave(const uint64_t* b, int64_t words, int channels, int nr, char* panel) {
    interleave_words(b, words, channels, nr, panel);
  }
};

}  // namespace
}  // namespace kdq

#include "x86/binary_gemm_simd.h"

namespace kdq {

extern const BinaryKernels kBinaryAvx512 = make_binary_kernels<Loops>({Bits::kRows, Loops::kPanel, 8, 3});

}  // namespace kdq
