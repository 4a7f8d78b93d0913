// The binary family on AVX2, by the tables of nibble_steps.h.
#include "x86/nibble_steps.h"
#include "x86/vec_avx2.h"

namespace kdq {
namespace {

struct Bits {
  using Words = __m256i;
  using Word = uint8_t;
  static constexpr int kLanes = 32;
  static constexpr int64_t kFlush = kStepsOfByte;
  // 12 sums, 2 weight vectors, 1 table, 1 count in flight: all 16 registers.
  static constexpr int kRows = 6;
  static constexpr int kCols = 2;

  static Words zero() { return _mm256_setzero_si256(); }
  static Words load(const Word* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Words set(Word offset) {
    return _mm256_broadcastsi128_si256(
        _mm_load_si128(reinterpret_cast<const __m128i*>(kDifferenceTables.count + offset)));
  }
  // The addition is spelled out since compilers put a copy beside every other one, and issue is the limit here.
  static void add(Words& sum, Words table, Words weights) {
    __asm__("vpaddb %1, %0, %0" : "+x"(sum) : "x"(_mm256_shuffle_epi8(table, weights)));
  }

  // Bytes to 16 bits: channels of even index, of odd index.
  static void add_widened(Words (&total)[2], Words sum) {
    total[0] = _mm256_add_epi16(total[0], _mm256_and_si256(sum, _mm256_set1_epi16(255)));
    total[1] = _mm256_add_epi16(total[1], _mm256_srli_epi16(sum, 8));
  }
  // 16 to 32 bits, in order.
  static void put_widened(const Words (&total)[2], bool add, int32_t* counts) {
    const __m256i low = _mm256_unpacklo_epi16(total[0], total[1]);
    const __m256i high = _mm256_unpackhi_epi16(total[0], total[1]);
    put_eight(_mm256_castsi256_si128(low), add, counts);
    put_eight(_mm256_castsi256_si128(high), add, counts + 8);
    put_eight(_mm256_extracti128_si256(low, 1), add, counts + 16);
    put_eight(_mm256_extracti128_si256(high, 1), add, counts + 24);
  }
  static void put_eight(__m128i total, bool add, int32_t* counts) {
    const __m256i wide = _mm256_cvtepu16_epi32(total);
    Vec::store_int(counts, add ? _mm256_add_epi32(wide, Vec::int_load(counts)) : wide);
  }

  static void interleave(const uint64_t* b, int64_t words, int channels, int nr, char* panel) {
    interleave_nibbles(b, words, channels, nr, panel);
  }
  static void spread(const uint64_t* bits, int64_t words, char* steps) { spread_nibbles(bits, words, steps); }
};

// Row-major on both sides: xor, then vpshufb looks up the bit count of each half byte (Mula, Kurz, Lemire 2018); bytes
// are widened by vpsadbw before they can overflow, at 8 bits a word.
struct RowBits {
  static constexpr int64_t kFlush = 31;

  static __m256i add(__m256i sum, __m256i v) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                           2, 3, 2, 3, 3, 4);
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(v, mask));
    const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi32(v, 4), mask));
    return _mm256_add_epi8(sum, _mm256_add_epi8(low, high));
  }
  // 64-bit lanes of which the upper half stays 0.
  static __m256i add_widened(__m256i total, __m256i sum) {
    return _mm256_add_epi32(total, _mm256_sad_epu8(sum, _mm256_setzero_si256()));
  }
};

}  // namespace
}  // namespace kdq

#include "x86/binary_gemm_simd.h"

namespace kdq {

extern const BinaryKernels kBinaryAvx2 = make_binary_kernels<Loops>({Bits::kRows, Loops::kPanel, 4, 1, 3});

}  // namespace kdq
