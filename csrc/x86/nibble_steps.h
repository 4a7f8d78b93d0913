// The binary family by table, for CPUs that cannot count bits in vectors. A step along K takes four bits: a row's four
// bits choose one of sixteen tables, and vpshufb looks up in it, for every channel at once, in how many bits the
// channel's four differ. One lookup and one addition count four bits of a byte's channel: a third of the instructions
// of xor and a table of bit counts (Mula, Kurz, Lemire 2018), which need both halves of every byte masked.
//
// Steps come in the order in which bytes are split: of each 64-bit word the lower halves of its bytes, then the upper.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "core/binary_gemm_kernels.h"

namespace kdq {
namespace {

constexpr int kStepsOfWord = 16;
// A byte counts up to 4 in each step.
constexpr int64_t kStepsOfByte = 255 / 4;

// count[16 * i + j]: bits in which i and j differ.
struct DifferenceTables {
  alignas(64) uint8_t count[256];
};
constexpr DifferenceTables make_difference_tables() {
  DifferenceTables tables = {};
  for (int i = 0; i < 256; ++i) {
    const int different = i / 16 ^ i % 16;
    tables.count[i] =
        static_cast<uint8_t>((different & 1) + (different >> 1 & 1) + (different >> 2 & 1) + (different >> 3));
  }
  return tables;
}
constexpr DifferenceTables kDifferenceTables = make_difference_tables();

// A row's bits -> where each step's table begins. The bits may be the last half of `steps`: each word is read before
// its place is overwritten.
inline void spread_nibbles(const uint64_t* bits, int64_t words, char* steps) {
  constexpr uint64_t kUpper = 0xF0F0F0F0F0F0F0F0U;
  for (int64_t w = 0; w < words; ++w, steps += kStepsOfWord) {
    uint64_t word = 0;
    memcpy(&word, bits + w, sizeof(word));
    const uint64_t offsets[2] = {word << 4 & kUpper, word & kUpper};
    memcpy(steps, offsets, sizeof(offsets));
  }
}

// 32 channels' words, transposed: bytes[j] is byte j of each. Channels 0 ... 15 lie in the lower half of a vector.
inline void transpose_bytes(const uint64_t (&word)[32], __m256i (&bytes)[8]) {
  const __m256i pairs =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  const __m128i* two = reinterpret_cast<const __m128i*>(word);
  __m256i a[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // channels 2 i, 2 i + 1 and these + 16, byte by byte
    const __m256i four = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128(two + i)), two[8 + i], 1);
    a[i] = _mm256_shuffle_epi8(four, pairs);
  }
  __m256i b[8];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // of eight channels, bytes 2 j, 2 j + 1 in b[4 i + j]
    const __m256i low01 = _mm256_unpacklo_epi16(a[4 * i], a[4 * i + 1]);
    const __m256i high01 = _mm256_unpackhi_epi16(a[4 * i], a[4 * i + 1]);
    const __m256i low23 = _mm256_unpacklo_epi16(a[4 * i + 2], a[4 * i + 3]);
    const __m256i high23 = _mm256_unpackhi_epi16(a[4 * i + 2], a[4 * i + 3]);
    b[4 * i] = _mm256_unpacklo_epi32(low01, low23);
    b[4 * i + 1] = _mm256_unpackhi_epi32(low01, low23);
    b[4 * i + 2] = _mm256_unpacklo_epi32(high01, high23);
    b[4 * i + 3] = _mm256_unpackhi_epi32(high01, high23);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    bytes[2 * j] = _mm256_unpacklo_epi64(b[j], b[4 + j]);
    bytes[2 * j + 1] = _mm256_unpackhi_epi64(b[j], b[4 + j]);
  }
}

// Row-major channels, of `words` words each, -> [steps][nr], four bits a byte; nr is a multiple of 32.
inline void interleave_nibbles(const uint64_t* b, int64_t words, int channels, int nr, char* panel) {
  const __m256i mask = _mm256_set1_epi8(15);
  const int64_t ahead = words_ahead(words, 32);
  for (int c = 0; c < nr; c += 32) {
    const int there = channels - c < 32 ? channels - c : 32;
    alignas(32) uint64_t word[32] = {};
    for (int64_t w = 0; w < words; ++w) {
      if (w % 8 == 0) {  // once for each line
        for (int i = 0; i < there; ++i) _mm_prefetch(b + (c + i) * words + w + ahead, _MM_HINT_T0);
      }
      for (int i = 0; i < there; ++i) word[i] = b[(c + i) * words + w];
      __m256i bytes[8];
      transpose_bytes(word, bytes);
      char* at = panel + w * kStepsOfWord * nr + c;
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(bytes[j], 4), mask);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + j * nr), _mm256_and_si256(bytes[j], mask));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + (8 + j) * nr), upper);
      }
    }
  }
}

}  // namespace
}  // namespace kdq
