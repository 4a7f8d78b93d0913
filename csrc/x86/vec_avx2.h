// Vec: eight float32 lanes in AVX2. What the *_simd.h loops are written in; vec_avx512.h has the same members.
//
// Everything lives in an anonymous namespace: code compiled with ISA flags must never be what the linker picks for a
// file compiled without. bfloat16 and float16 are widened on load and rounded half-to-even on store; `part` forms
// touch the first n lanes only (0 <= n < kLanes) and read zeros in the others.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "core/elements.h"

namespace kdq {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  using Float = __m256;
  using Int = __m256i;
  using Mask = __m256;
  struct Pair {
    Float first;
    Float second;
  };

  static Float set(float value) { return _mm256_set1_ps(value); }
  static Float zero() { return _mm256_setzero_ps(); }

  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load(const BFloat16* p) { return widen_bf16(load_16bit(p)); }
  static Float load(const Float16* p) { return _mm256_cvtph_ps(load_16bit(p)); }
  static Float load_part(const float* p, int n) { return _mm256_maskload_ps(p, lanes_below(n)); }
  template <class Half>
  static Float load_part(const Half* p, int n) {
    Half lanes[kLanes] = {};
    memcpy(lanes, p, sizeof(Half) * static_cast<size_t>(n));
    return load(lanes);
  }

  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static void store(BFloat16* p, Float v) { store_16bit(p, narrow_bf16(v)); }
  static void store(Float16* p, Float v) { store_16bit(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  static void store_part(float* p, Float v, int n) { _mm256_maskstore_ps(p, lanes_below(n), v); }
  template <class Half>
  static void store_part(Half* p, Float v, int n) {
    Half lanes[kLanes];
    store(lanes, v);
    memcpy(p, lanes, sizeof(Half) * static_cast<size_t>(n));
  }

  // Past the caches, to memory: p aligned to the vector's size.
  static void stream(float* p, Float v) { _mm256_stream_ps(p, v); }
  static void stream(BFloat16* p, Float v) { stream_16bit(p, narrow_bf16(v)); }
  static void stream(Float16* p, Float v) { stream_16bit(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

  // 2 kLanes elements as two vectors: bfloat16 as the elements of even and of odd index, since then no lane crosses
  // another's path, which halves the instructions of load and store; others in their order. A pair of bfloat16 may be
  // stored where values are NaN only where a bfloat16 was: the payload of another NaN may overflow when it is rounded.
  static Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
  static Pair load_pair(const Float16* p) { return {load(p), load(p + kLanes)}; }
  static Pair load_pair(const BFloat16* p) {
    const Int v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {as_float(_mm256_slli_epi32(v, 16)), as_float(int_and(v, upper_halves()))};
  }
  // 2 kLanes floats in the order of load_pair() of the first argument's type.
  template <class T>
  static Pair load_pair_for(const T*, const float* p) {
    return load_pair(p);
  }
  static Pair load_pair_for(const BFloat16*, const float* p) {
    const Pair v = load_pair(p);
    return {in_order(_mm256_shuffle_ps(v.first, v.second, 0x88)), in_order(_mm256_shuffle_ps(v.first, v.second, 0xDD))};
  }
  static Int narrow_pair(const BFloat16*, Pair v) {
    return _mm256_blend_epi16(_mm256_srli_epi32(round_bf16(as_int(v.first)), 16), round_bf16(as_int(v.second)), 0xAA);
  }
  static Int narrow_pair(const Float16*, Pair v) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(v.first, _MM_FROUND_TO_NEAREST_INT)),
                                   _mm256_cvtps_ph(v.second, _MM_FROUND_TO_NEAREST_INT), 1);
  }
  template <class Half>
  static void store_pair(Half* p, Pair v) {
    store_whole(p, narrow_pair(p, v));
  }
  static void store_pair(float* p, Pair v) {
    store(p, v.first);
    store(p + kLanes, v.second);
  }
  template <class Half>
  static void stream_pair(Half* p, Pair v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_pair(p, v));
  }
  static void stream_pair(float* p, Pair v) {
    stream(p, v.first);
    stream(p + kLanes, v.second);
  }

  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float round(Float v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // Both return v where it is NaN: the instruction gives its second operand then.
  static Float at_least(Float low, Float v) { return _mm256_max_ps(low, v); }
  static Float at_most(Float high, Float v) { return _mm256_min_ps(high, v); }
  static Float abs(Float v) { return _mm256_andnot_ps(set(-0.0F), v); }

  static Mask equal(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static Mask less(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Mask int_less(Int a, Int b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a)); }
  static Mask is_nan(Float v) { return _mm256_cmp_ps(v, v, _CMP_UNORD_Q); }
  static Float select(Mask mask, Float yes, Float no) { return _mm256_blendv_ps(no, yes, mask); }
  static Float sub_where(Mask mask, Float a, Float b) { return sub(a, _mm256_and_ps(mask, b)); }
  static Float add_unless(Mask mask, Float a, Float b) { return add(a, _mm256_andnot_ps(mask, b)); }
  static uint32_t bits(Mask mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask)); }
  static Mask first_lanes(int n) { return as_float(lanes_below(n)); }

  // Bit i: is element i of 64 below zero? (-0 and NaN are not.)
  static uint64_t below_zero(const Float (&v)[8]) {
    uint64_t word = 0;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(bits(less(v[i], zero()))) << (8 * i);
    return word;
  }

  // A fixed tree, the same for every caller: ((0+4)+(2+6)) + ((1+5)+(3+7)).
  static float sum(Float v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

  static float largest(Float v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

  // Eight rows to eight columns: pairs of lanes, pairs of pairs, then halves.
  static void transpose(Float (&v)[kLanes]) {
    Float t[kLanes];
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i += 2) {
      t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kLanes; i += 4) {
      v[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      v[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
      v[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      v[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Float first = v[i];
      v[i] = _mm256_permute2f128_ps(first, v[i + 4], 0x20);
      v[i + 4] = _mm256_permute2f128_ps(first, v[i + 4], 0x31);
    }
  }

  static Int int_zero() { return _mm256_setzero_si256(); }
  static Int int_set(int32_t value) { return _mm256_set1_epi32(value); }
  static Int int_load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Int int_load_part(const int32_t* p, int n) { return _mm256_maskload_epi32(p, lanes_below(n)); }
  static Int int_load(const int8_t* p) { return _mm256_cvtepi8_epi32(load_bytes(p)); }
  static Int int_load(const uint8_t* p) { return _mm256_cvtepu8_epi32(load_bytes(p)); }
  template <class Small>
  static Int int_load_part(const Small* p, int n) {
    Small lanes[kLanes] = {};
    memcpy(lanes, p, sizeof(Small) * static_cast<size_t>(n));
    return int_load(lanes);
  }
  static Int int_sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static Int int_add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int int_mul(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  static Int int_max(Int a, Int b) { return _mm256_max_epi32(a, b); }
  static Int int_xor(Int a, Int b) { return _mm256_xor_si256(a, b); }
  static Int int_and(Int a, Int b) { return _mm256_and_si256(a, b); }
  template <int kBits>
  static Int shift_left(Int v) {
    return _mm256_slli_epi32(v, kBits);
  }
  template <int kBits>
  static Int shift_right_signed(Int v) {
    return _mm256_srai_epi32(v, kBits);
  }
  // Zeros come in; by the number in each lane of bits.
  static Int shift_right(Int v, Int bits) { return _mm256_srlv_epi32(v, bits); }
  static Int as_int(Float v) { return _mm256_castps_si256(v); }
  static Float as_float(Int v) { return _mm256_castsi256_ps(v); }
  static Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
  static Int to_int(Float v) { return _mm256_cvtps_epi32(v); }  // half-to-even
  // v * 2^n for an integer n from -126 to 127, where 2^n is a float; at 128 it is inf.
  static Float times_power(Float v, Float n) {
    return mul(v, as_float(_mm256_slli_epi32(int_add(to_int(n), int_set(127)), 23)));
  }
  // Of words of 64 bits.
  static Int load_words(const uint64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Int load_words_part(const uint64_t* p, int n) {
    return _mm256_maskload_epi64(reinterpret_cast<const long long*>(p), lanes_below(2 * n));
  }
  // The sums of the lanes of four vectors.
  static void store_sums(int32_t* p, const Int (&v)[4]) {
    const Int first = int_add(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
    const Int second = int_add(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
    const Int halves = int_add(_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_add_epi32(low(halves), high(halves)));
  }
  static int32_t max_lane(Int v) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
  }

  // Narrowing stores of integers that fit.
  static void store_int(int32_t* p, Int v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static void store_int(int16_t* p, Int v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(low(v), high(v)));
  }
  static void store_int(int8_t* p, Int v) {
    const __m128i words = _mm_packs_epi32(low(v), high(v));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  static void store_int(uint8_t* p, Int v) {
    const __m128i words = _mm_packs_epi32(low(v), high(v));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  // round(v) + kOffset + zero_point, which fits, half to even: as many vectors as narrow to a full one. The packs work
  // on 128-bit halves, hence the permutation.
  template <int kOffset>
  static void store_rounded(int16_t* p, const Float (&v)[2], int zero_point) {
    store_whole(p, _mm256_permute4x64_epi64(rounded_words(v[0], v[1], kOffset + zero_point), 0xD8));
  }
  template <int kOffset>
  static void store_rounded(uint8_t* p, const Float (&v)[4], int zero_point) {
    const Int bytes = _mm256_packus_epi16(rounded_words(v[0], v[1], kOffset + zero_point),
                                          rounded_words(v[2], v[3], kOffset + zero_point));
    store_whole(p, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  }
  // Of 64 bytes below 2^bits, the planes: bit i of word p * stride is bit p of byte i.
  static void store_bits(const uint8_t* bytes, int bits, uint64_t* planes, int64_t stride) {
    const __m128i above = _mm_cvtsi32_si128(8 - bits);
    const __m256i* halves = reinterpret_cast<const __m256i*>(bytes);
    Int low = _mm256_sll_epi16(_mm256_loadu_si256(halves), above);
    Int high = _mm256_sll_epi16(_mm256_loadu_si256(halves + 1), above);
    for (int p = bits - 1; p >= 0; --p, low = _mm256_add_epi8(low, low), high = _mm256_add_epi8(high, high)) {
      planes[p * stride] = static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(low))) |
                           static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(high))) << 32;
    }
  }
  template <class Out>
  static void store_int_part(Out* p, Int v, int n) {
    Out lanes[kLanes];
    store_int(lanes, v);
    memcpy(p, lanes, sizeof(Out) * static_cast<size_t>(n));
  }

 private:
  // What a shuffle, which works on 128-bit halves, leaves of two vectors.
  static Float in_order(Float v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xD8)); }
  static Int rounded_words(Float a, Float b, int offset) {
    return _mm256_add_epi16(_mm256_packs_epi32(to_int(a), to_int(b)), _mm256_set1_epi16(static_cast<int16_t>(offset)));
  }
  static void store_whole(void* p, Int v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static __m128i low(Int v) { return _mm256_castsi256_si128(v); }
  static __m128i high(Int v) { return _mm256_extracti128_si256(v, 1); }
  static __m128i load_bytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
  static __m128i load_16bit(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static void store_16bit(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
  static void stream_16bit(void* p, __m128i v) { _mm_stream_si128(static_cast<__m128i*>(p), v); }
  static Int upper_halves() { return int_set(static_cast<int32_t>(0xFFFF0000U)); }

  static __m256i lanes_below(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static Float widen_bf16(__m128i v) { return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }

  // Adds just under half of the lower 16 bits, plus one when the upper half is odd, which is then the result.
  static Int round_bf16(Int bits_in) {
    const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits_in, 16), int_set(1));
    return _mm256_add_epi32(bits_in, _mm256_add_epi32(odd, int_set(0x7FFF)));
  }

  // NaN would overflow into inf or lose its payload when rounded, so it becomes a quiet NaN of the same sign instead.
  static __m128i narrow_bf16(Float v) {
    const Int bits_in = as_int(v);
    const Int rounded = round_bf16(bits_in);
    const Int quiet = _mm256_or_si256(bits_in, int_set(0x400000));
    const Int chosen = _mm256_blendv_epi8(rounded, quiet, as_int(is_nan(v)));
    const Int upper = _mm256_srli_epi32(chosen, 16);
    return _mm_packus_epi32(low(upper), high(upper));
  }
};

}  // namespace
}  // namespace kdq
