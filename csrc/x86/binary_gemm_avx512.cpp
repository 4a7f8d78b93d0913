// The binary family on AVX-512 without VPOPCNTDQ: binary_gemm_avx2.cpp in 512 bits.
#include "x86/nibble_steps.h"
#include "x86/vec_avx512.h"

namespace kdq {
namespace {

struct Bits {
  using Words = __m512i;
  using Word = uint8_t;
  static constexpr int kLanes = 64;
  static constexpr int64_t kFlush = kStepsOfByte;
  // 16 sums, 2 weight vectors, 1 table, 1 count in flight: 20 of 32 registers. A wider panel would suit few layers.
  static constexpr int kRows = 8;
  static constexpr int kCols = 2;

  static Words zero() { return _mm512_setzero_si512(); }
  static Words load(const Word* p) { return _mm512_loadu_si512(p); }
  static Words set(Word offset) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kDifferenceTables.count + offset)));
  }
  static void add(Words& sum, Words table, Words weights) {
    __asm__("vpaddb %1, %0, %0" : "+v"(sum) : "v"(_mm512_shuffle_epi8(table, weights)));
  }

  static void add_widened(Words (&total)[2], Words sum) {
    total[0] = _mm512_add_epi16(total[0], _mm512_and_si512(sum, _mm512_set1_epi16(255)));
    total[1] = _mm512_add_epi16(total[1], _mm512_srli_epi16(sum, 8));
  }
  static void put_widened(const Words (&total)[2], bool add, int32_t* counts) {
    const __m512i low = _mm512_unpacklo_epi16(total[0], total[1]);
    const __m512i high = _mm512_unpackhi_epi16(total[0], total[1]);
    put_quarter<0>(low, high, add, counts);
    put_quarter<1>(low, high, add, counts);
    put_quarter<2>(low, high, add, counts);
    put_quarter<3>(low, high, add, counts);
  }
  template <int kQuarter>
  static void put_quarter(__m512i low, __m512i high, bool add, int32_t* counts) {
    const __m256i both =
        _mm256_set_m128i(_mm512_extracti32x4_epi32(high, kQuarter), _mm512_extracti32x4_epi32(low, kQuarter));
    const __m512i wide = _mm512_cvtepu16_epi32(both);
    counts += 16 * kQuarter;
    Vec::store_int(counts, add ? _mm512_add_epi32(wide, Vec::int_load(counts)) : wide);
  }

  static void interleave(const uint64_t* b, int64_t words, int channels, int nr, char* panel) {
    interleave_nibbles(b, words, channels, nr, panel);
  }
  static void spread(const uint64_t* bits, int64_t words, char* steps) { spread_nibbles(bits, words, steps); }
};

struct RowBits {
  static constexpr int64_t kFlush = 31;

  static __m512i add(__m512i sum, __m512i v) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(v, mask));
    const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi32(v, 4), mask));
    return _mm512_add_epi8(sum, _mm512_add_epi8(low, high));
  }
  // 64-bit lanes of which the upper half stays 0.
  static __m512i add_widened(__m512i total, __m512i sum) {
    return _mm512_add_epi32(total, _mm512_sad_epu8(sum, _mm512_setzero_si512()));
  }
};

}  // namespace
}  // namespace kdq

#include "x86/binary_gemm_simd.h"

namespace kdq {

extern const BinaryKernels kBinaryAvx512 = make_binary_kernels<Loops>({Bits::kRows, Loops::kPanel, 4, 1, 3});

}  // namespace kdq
