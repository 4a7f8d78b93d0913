// The binary family on AVX2: vpshufb looks up the bit count of each half byte (Mula, Kurz, Lemire 2018), byte counters
// are widened by vpsadbw before they can overflow: 8 bits a word, so after 31 words.
#include "x86/interleave_words.h"
#include "x86/vec_avx2.h"

namespace kdq {
namespace {

struct Bits {
  using Words = __m256i;
  using Word = uint64_t;
  static constexpr int kLanes = 4;
  static constexpr int64_t kFlush = 31;
  // 8 sums, 2 weight vectors, 1 broadcast, table, mask, and 3 for the count in flight: all 16 registers.
  static constexpr int kRows = 4;
  static constexpr int kCols = 1;  // of eight channels: two vectors of words

  static Words zero() { return _mm256_setzero_si256(); }
  static Words load(const Word* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Words set(Word word) { return _mm256_set1_epi64x(static_cast<long long>(word)); }
  static Words differ(Words a, Words b) { return _mm256_xor_si256(a, b); }

  static Words add(Words sum, Words v) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                           2, 3, 2, 3, 3, 4);
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(v, mask));
    const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi32(v, 4), mask));
    return _mm256_add_epi8(sum, _mm256_add_epi8(low, high));
  }
  static Words add_widened(Words total, Words sum) { return _mm256_add_epi64(total, _mm256_sad_epu8(sum, zero())); }

  // The low halves of two vectors of words.
  static __m256i narrow(Words a, Words b) {
    const __m256i halves = _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
    return _mm256_permute4x64_epi64(halves, 0xD8);
  }
  static int64_t sum_lanes(Words total) {
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    return _mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1);
  }

  static void interleave(const uint64_t* b, int64_t words, int channels, int nr, char* panel) {
    interleave_words(b, words, channels, nr, panel);
  }
};

}  // namespace
}  // namespace kdq

#include "x86/binary_gemm_simd.h"

namespace kdq {

extern const BinaryKernels kBinaryAvx2 = make_binary_kernels<Loops>({Bits::kRows, Loops::kPanel, 8, 3});

}  // namespace kdq
