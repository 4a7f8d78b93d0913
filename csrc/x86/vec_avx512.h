// Vec: sixteen float32 lanes in AVX-512 (F, BW, VL, DQ). The same members as vec_avx2.h, which explains them.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "core/elements.h"

namespace kdq {
namespace {

struct Vec {
  static constexpr int kLanes = 16;
  using Float = __m512;
  using Int = __m512i;
  using Mask = __mmask16;
  struct Pair {
    Float first;
    Float second;
  };

  static Float set(float value) { return _mm512_set1_ps(value); }
  static Float zero() { return _mm512_setzero_ps(); }

  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load(const BFloat16* p) { return widen_bf16(load_16bit(p)); }
  static Float load(const Float16* p) { return _mm512_cvtph_ps(load_16bit(p)); }
  static Float load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes_below(n), p); }
  static Float load_part(const BFloat16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(lanes_below(n), p)); }
  static Float load_part(const Float16* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_below(n), p));
  }

  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat16* p, Float v) { store_16bit(p, narrow_bf16(v)); }
  static void store(Float16* p, Float v) { store_16bit(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  static void store_part(float* p, Float v, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), v); }
  static void store_part(BFloat16* p, Float v, int n) { _mm256_mask_storeu_epi16(p, lanes_below(n), narrow_bf16(v)); }
  static void store_part(Float16* p, Float v, int n) {
    _mm256_mask_storeu_epi16(p, lanes_below(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static void stream(float* p, Float v) { _mm512_stream_ps(p, v); }
  static void stream(BFloat16* p, Float v) { stream_16bit(p, narrow_bf16(v)); }
  static void stream(Float16* p, Float v) { stream_16bit(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

  static Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
  static Pair load_pair(const Float16* p) { return {load(p), load(p + kLanes)}; }
  static Pair load_pair(const BFloat16* p) {
    const Int v = _mm512_loadu_si512(p);
    return {as_float(_mm512_slli_epi32(v, 16)), as_float(int_and(v, upper_halves()))};
  }
  template <class T>
  static Pair load_pair_for(const T*, const float* p) {
    return load_pair(p);
  }
  static Pair load_pair_for(const BFloat16*, const float* p) {
    const Int even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const Pair v = load_pair(p);
    return {_mm512_permutex2var_ps(v.first, even, v.second),
            _mm512_permutex2var_ps(v.first, int_add(even, int_set(1)), v.second)};
  }
  static Int narrow_pair(const BFloat16*, Pair v) {
    return _mm512_mask_blend_epi16(0xAAAAAAAAU, _mm512_srli_epi32(round_bf16(as_int(v.first)), 16),
                                   round_bf16(as_int(v.second)));
  }
  static Int narrow_pair(const Float16*, Pair v) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(v.first, _MM_FROUND_TO_NEAREST_INT)),
                              _mm512_cvtps_ph(v.second, _MM_FROUND_TO_NEAREST_INT), 1);
  }
  template <class Half>
  static void store_pair(Half* p, Pair v) {
    _mm512_storeu_si512(p, narrow_pair(p, v));
  }
  static void store_pair(float* p, Pair v) {
    store(p, v.first);
    store(p + kLanes, v.second);
  }
  template <class Half>
  static void stream_pair(Half* p, Pair v) {
    _mm512_stream_si512(reinterpret_cast<Int*>(p), narrow_pair(p, v));
  }
  static void stream_pair(float* p, Pair v) {
    stream(p, v.first);
    stream(p + kLanes, v.second);
  }

  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float round(Float v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Float at_least(Float low, Float v) { return _mm512_max_ps(low, v); }
  static Float at_most(Float high, Float v) { return _mm512_min_ps(high, v); }
  static Float abs(Float v) { return _mm512_abs_ps(v); }

  static Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask int_less(Int a, Int b) { return _mm512_cmplt_epi32_mask(a, b); }
  static Mask is_nan(Float v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
  static Float select(Mask mask, Float yes, Float no) { return _mm512_mask_blend_ps(mask, no, yes); }
  static Float sub_where(Mask mask, Float a, Float b) { return _mm512_mask_sub_ps(a, mask, a, b); }
  static Float add_unless(Mask mask, Float a, Float b) { return _mm512_mask_add_ps(a, _knot_mask16(mask), a, b); }
  static uint32_t bits(Mask mask) { return mask; }
  static Mask first_lanes(int n) { return lanes_below(n); }

  // By the sign bits of min(v, 0), which is +0 for -0 and NaN, narrowed to bytes: four comparisons into mask registers,
  // and these into a word, take twice as long.
  static uint64_t below_zero(const Float (&v)[4]) {
    Int low[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) low[i] = as_int(_mm512_min_ps(v[i], zero()));
    const Int bytes = _mm512_packs_epi16(_mm512_packs_epi32(low[0], low[1]), _mm512_packs_epi32(low[2], low[3]));
    return _mm512_movepi8_mask(in_order(bytes));
  }

  static float sum(Float v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

  static float largest(Float v) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

  // Sixteen rows to sixteen columns: pairs of lanes, pairs of pairs, then quarters.
  static void transpose(Float (&v)[kLanes]) {
    Float t[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; i += 2) {
      t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i += 4) {
      v[i] = low_pairs(t[i], t[i + 2]);
      v[i + 1] = high_pairs(t[i], t[i + 2]);
      v[i + 2] = low_pairs(t[i + 1], t[i + 3]);
      v[i + 3] = high_pairs(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xDD);
      t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xDD);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
      v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD);
    }
  }

  static Int int_zero() { return _mm512_setzero_si512(); }
  static Int int_set(int32_t value) { return _mm512_set1_epi32(value); }
  static Int int_load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static Int int_load(const int8_t* p) { return _mm512_cvtepi8_epi32(load_bytes(p)); }
  static Int int_load(const uint8_t* p) { return _mm512_cvtepu8_epi32(load_bytes(p)); }
  static Int int_load_part(const int32_t* p, int n) { return _mm512_maskz_loadu_epi32(lanes_below(n), p); }
  static Int int_load_part(const int8_t* p, int n) {
    return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes_below(n), p));
  }
  static Int int_load_part(const uint8_t* p, int n) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes_below(n), p));
  }
  static Int int_sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static Int int_add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int int_mul(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static Int int_max(Int a, Int b) { return _mm512_max_epi32(a, b); }
  static Int int_xor(Int a, Int b) { return _mm512_xor_si512(a, b); }
  static Int int_and(Int a, Int b) { return _mm512_and_si512(a, b); }
  template <int kBits>
  static Int shift_left(Int v) {
    return _mm512_slli_epi32(v, kBits);
  }
  template <int kBits>
  static Int shift_right_signed(Int v) {
    return _mm512_srai_epi32(v, kBits);
  }
  static Int shift_right(Int v, Int bits) { return _mm512_srlv_epi32(v, bits); }
  static Int as_int(Float v) { return _mm512_castps_si512(v); }
  static Float as_float(Int v) { return _mm512_castsi512_ps(v); }
  static Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  static Int to_int(Float v) { return _mm512_cvtps_epi32(v); }
  static Float times_power(Float v, Float n) { return _mm512_scalef_ps(v, n); }
  static Int load_words(const uint64_t* p) { return _mm512_loadu_si512(p); }
  static Int load_words_part(const uint64_t* p, int n) {
    return _mm512_maskz_loadu_epi64(static_cast<__mmask8>((1U << n) - 1U), p);
  }
  static void store_sums(int32_t* p, const Int (&v)[4]) {
    const Int four = sums_in_quarters(v);
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
    const __m128i one = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), one);
  }
  static int32_t max_lane(Int v) { return _mm512_reduce_max_epi32(v); }

  static void store_int(int32_t* p, Int v) { _mm512_storeu_si512(p, v); }
  static void store_int(int16_t* p, Int v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
  static void store_int(int8_t* p, Int v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static void store_int(uint8_t* p, Int v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  template <int kOffset>
  static void store_rounded(int16_t* p, const Float (&v)[2], int zero_point) {
    Int q[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) q[i] = int_add(to_int(v[i]), int_set(kOffset + zero_point));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi64(even_then_odd(), _mm512_packs_epi32(q[0], q[1])));
  }
  // Adding 1.5 * 2^23 leaves an integer in the low bits: one addition rounds and takes the offset in, where a
  // conversion would only round. The 16 low bits are all that is looked at.
  template <int kOffset>
  static void store_rounded(uint8_t* p, const Float (&v)[4], int zero_point) {
    static_assert(kOffset % 2 == 0, "ties must go to the same side as without the offset");
    const Int words_more = _mm512_set1_epi16(static_cast<int16_t>(zero_point));
    const Float to_low_bits = set(12582912.0F + kOffset);
    Int q[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) q[i] = as_int(add(v[i], to_low_bits));
    const Int words = _mm512_packus_epi16(_mm512_add_epi16(low_halves(q[0], q[1]), words_more),
                                          _mm512_add_epi16(low_halves(q[2], q[3]), words_more));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi64(even_then_odd(), words));
  }
  // Of 64 bytes below 2^bits, the planes: bit i of word p * stride is bit p of byte i.
  static void store_bits(const uint8_t* bytes, int bits, uint64_t* planes, int64_t stride) {
    Int v = _mm512_sll_epi16(_mm512_loadu_si512(bytes), _mm_cvtsi32_si128(8 - bits));
    for (int p = bits - 1; p >= 0; --p, v = _mm512_add_epi8(v, v)) planes[p * stride] = _mm512_movepi8_mask(v);
  }
  static void store_int_part(int32_t* p, Int v, int n) { _mm512_mask_storeu_epi32(p, lanes_below(n), v); }
  static void store_int_part(int16_t* p, Int v, int n) { _mm512_mask_cvtepi32_storeu_epi16(p, lanes_below(n), v); }
  static void store_int_part(int8_t* p, Int v, int n) { _mm512_mask_cvtepi32_storeu_epi8(p, lanes_below(n), v); }
  static void store_int_part(uint8_t* p, Int v, int n) { _mm512_mask_cvtepi32_storeu_epi8(p, lanes_below(n), v); }

 private:
  static Float low_pairs(Float a, Float b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static Float high_pairs(Float a, Float b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  // Of each 128 bits of four vectors, the sums, side by side.
  static Int sums_in_quarters(const Int (&v)[4]) {
    const Int first = int_add(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const Int second = int_add(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    return int_add(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  }
  // What two levels of packs, which work on 128-bit quarters, leave of four vectors of int32.
  static Int in_order(Int bytes) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
  }
  static Int even_then_odd() { return _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7); }
  // The low 16 bits of the lanes of a, then those of b.
  static Int low_halves(Int a, Int b) {
    const Int even_words = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                            24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutex2var_epi16(a, even_words, b);
  }
  static Mask lanes_below(int n) { return static_cast<Mask>((1U << n) - 1U); }
  static __m128i load_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m256i load_16bit(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_16bit(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static void stream_16bit(void* p, __m256i v) { _mm256_stream_si256(static_cast<__m256i*>(p), v); }
  static Int upper_halves() { return int_set(static_cast<int32_t>(0xFFFF0000U)); }

  static Float widen_bf16(__m256i v) { return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

  static Int round_bf16(Int bits_in) {
    const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits_in, 16), int_set(1));
    return _mm512_add_epi32(bits_in, _mm512_add_epi32(odd, int_set(0x7FFF)));
  }

  static __m256i narrow_bf16(Float v) {
    const Int bits_in = as_int(v);
    const Int rounded = round_bf16(bits_in);
    const Int quiet = _mm512_or_si512(bits_in, int_set(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan(v), rounded, quiet), 16));
  }
};

}  // namespace
}  // namespace kdq
