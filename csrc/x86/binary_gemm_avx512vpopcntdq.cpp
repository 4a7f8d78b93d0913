// The binary family on AVX-512 VPOPCNTDQ: xor, vpopcntd, add, three instructions for 512 bits. Lanes are 32 bits wide,
// so that sixteen sums are sixteen int32 results, and a panel has the shape of the int8 family's.
#include "core/binary_gemm_kernels.h"
#include "x86/vec_avx512.h"

namespace kdq {
namespace {

// 16 x 16 words of 32 bits, transposed in registers: rows[i][j] becomes rows[j][i]. Pairs of words, then of pairs,
// within each 128 bits; then the 128-bit quarters.
inline void transpose(__m512i (&rows)[16]) {
  __m512i a[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    const __m512i low01 = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    const __m512i high01 = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    const __m512i low23 = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
    const __m512i high23 = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    a[i] = _mm512_unpacklo_epi64(low01, low23);
    a[i + 1] = _mm512_unpackhi_epi64(low01, low23);
    a[i + 2] = _mm512_unpacklo_epi64(high01, high23);
    a[i + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // a[4 g + j]: of rows 4 g ... 4 g + 3, words j, 4 + j, 8 + j, 12 + j
    const __m512i even01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xDD);
    const __m512i even23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xDD);
    rows[j] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(even01, even23, 0xDD);
    rows[4 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    rows[12 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0xDD);
  }
}

struct Bits {
  using Words = __m512i;
  using Word = uint32_t;
  static constexpr int kLanes = 16;
  static constexpr int64_t kFlush = 0;  // never: sums are as wide as the words
  // 24 sums, 4 weight vectors, 1 broadcast, 1 count in flight: 30 of 32 registers.
  static constexpr int kRows = 6;
  static constexpr int kCols = 4;

  static Words zero() { return _mm512_setzero_si512(); }
  static Words load(const Word* p) { return _mm512_loadu_si512(p); }
  static Words set(Word word) { return _mm512_set1_epi32(static_cast<int>(word)); }
  static void add(Words& sum, Words row, Words weights) {
    sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(_mm512_xor_si512(row, weights)));
  }

  // [2 * words][nr] words of 32 bits.
  static void interleave(const uint64_t* b, int64_t words, int channels, int nr, char* panel) {
    const int64_t halves = 2 * words;
    const int64_t ahead = 2 * words_ahead(words, 16);
    for (int c = 0; c < nr; c += 16) {
      for (int64_t w = 0; w < halves; w += 16) {
        const int64_t left = halves - w < 16 ? halves - w : 16;
        const __mmask16 wanted = static_cast<__mmask16>((1U << left) - 1U);
        __m512i rows[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const bool there = c + i < channels;
          const Word* row = reinterpret_cast<const Word*>(b + (there ? c + i : 0) * words) + w;
          rows[i] = _mm512_maskz_loadu_epi32(there ? wanted : __mmask16{0}, row);
          _mm_prefetch(row + ahead, _MM_HINT_T0);
        }
        transpose(rows);
        char* at = panel + (w * nr + c) * static_cast<int64_t>(sizeof(Word));
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          if (i < left) _mm512_storeu_si512(at + i * nr * static_cast<int64_t>(sizeof(Word)), rows[i]);
        }
      }
    }
  }
  static void spread(const uint64_t* bits, int64_t words, char* steps) {
    if (reinterpret_cast<const char*>(bits) != steps)
      memcpy(steps, bits, static_cast<size_t>(words) * sizeof(uint64_t));
  }
};

struct RowBits {
  static constexpr int64_t kFlush = 0;
  static __m512i add(__m512i sum, __m512i v) { return _mm512_add_epi32(sum, _mm512_popcnt_epi32(v)); }
  static __m512i add_widened(__m512i total, __m512i sum) { return _mm512_add_epi32(total, sum); }
};

}  // namespace
}  // namespace kdq

#include "x86/binary_gemm_simd.h"

namespace kdq {

extern const BinaryKernels kBinaryAvx512Vpopcntdq = make_binary_kernels<Loops>({Bits::kRows, Loops::kPanel, 32, 4, 2});

}  // namespace kdq
