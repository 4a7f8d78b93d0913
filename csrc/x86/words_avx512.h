// 64-bit words in AVX-512 vectors: what the two binary kernels on AVX-512 share.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace kdq {
namespace {

struct Words512 {
  using Words = __m512i;
  static constexpr int kLanes = 8;

  static Words zero() { return _mm512_setzero_si512(); }
  static Words load(const uint64_t* p) { return _mm512_loadu_si512(p); }
  static Words set(uint64_t word) { return _mm512_set1_epi64(static_cast<long long>(word)); }
  static Words differ(Words a, Words b) { return _mm512_xor_si512(a, b); }
  static void store_narrow(int32_t* p, Words total) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(total));
  }
  static int64_t sum_lanes(Words total) { return _mm512_reduce_add_epi64(total); }
};

}  // namespace
}  // namespace kdq
