// binary_gemm: matrix products of +-1 vectors by xor and popcount (Courbariaux et al. 2016; Rastegari et al. 2016).
//
// Storage of a row of k signs: ceil(k / 64) little-endian uint64 words, element i in bit i % 64 of word i / 64. A set
// bit means -1; sign(0) = sign(-0.0) = sign(NaN) = +1. The tail bits of a row's last word are zero; a row in which they
// are not is refused. Then, with the true k,
//   dot(a, b) = k - 2 * popcount(a xor b).
#pragma once

#include "kdq/parallel.h"
#include "kdq/status.h"
#include "kdq/types.h"

namespace kdq {

constexpr int64_t binary_words(int64_t k) { return (k + 63) / 64; }

// x [rows, k] -> bits [rows, binary_words(k)].
KDQ_API Status pack_signs(DType dtype, const void* x, int64_t rows, int64_t k, uint64_t* bits,
                          const ParallelFor& parallel_for);

// bits [rows, binary_words(k)] -> x float32 [rows, k] of +-1.
KDQ_API Status unpack_signs(const uint64_t* bits, int64_t rows, int64_t k, float* x, const ParallelFor& parallel_for);

// a_bits [m, words], b_bits [n, words] -> out int32 [m, n], exact. k < 2^31.
KDQ_API Status binary_matmul(const uint64_t* a_bits, const uint64_t* b_bits, int64_t m, int64_t n, int64_t k,
                             int32_t* out, const ParallelFor& parallel_for);

// y [m, n] = dot(sign(x), w) * weight_scale + bias, in `dtype`; signs of x are packed inside.
struct BinaryLinear {
  DType dtype = DType::kFloat32;     // of x and y
  const void* x = nullptr;           // [m, k]
  const uint64_t* x_bits = nullptr;  // or, instead of x, its signs [m, binary_words(k)]
  void* y = nullptr;                 // [m, n]
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  const uint64_t* weight_bits = nullptr;  // [n, binary_words(k)]
  const float* weight_scale = nullptr;    // [n]; XNOR-Net's alpha, the mean |w| of the channel
  const float* bias = nullptr;            // [n], or nullptr
};

KDQ_API Status binary_linear(const BinaryLinear& args, const ParallelFor& parallel_for);

// y_bits [m, binary_words(n)]: bit c is set, which means -1, where dot(sign(x), w[c]) < threshold[c]; tail bits are
// zero.
//
// A binary layer whose results only go to the next one's sign: batch norm and sign of an integer are a comparison with
// an integer (Hubara et al. 2016). Where the norm's factor is negative, invert the channel's weight bits, which negates
// its dot. Thresholds of at most -k and of more than k make a channel constant. No dot is ever stored beyond a tile.
struct BinaryThreshold {
  DType dtype = DType::kFloat32;     // of x
  const void* x = nullptr;           // [m, k]
  const uint64_t* x_bits = nullptr;  // or, instead of x, its signs [m, binary_words(k)]
  uint64_t* y_bits = nullptr;        // [m, binary_words(n)]
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  const uint64_t* weight_bits = nullptr;  // [n, binary_words(k)]
  const int32_t* threshold = nullptr;     // [n]
};

KDQ_API Status binary_threshold(const BinaryThreshold& args, const ParallelFor& parallel_for);

}  // namespace kdq
