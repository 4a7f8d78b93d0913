// bitplanes: products of integers of few bits by xor and popcount (Zhou et al. 2016, DoReFa-Net, section 2.1; Umuroglu
// et al. 2018, BISMO). P-bit rows times Q-bit rows are P * Q products of sign bits, which is quicker than int8 where
// the machine does more than P * Q binary operations in the time of one.
//
// A plane is a matrix of bits as in kdq/binary_gemm.h: ceil(k / 64) words a row, tail bits zero. Plane p of a matrix
// holds bit p of the code of each element; planes follow one another, [bits, rows, words]. A set bit means -1, so that
// with s_p = 1 - 2 * bit_p and S = sum of 2^p s_p a code is (2^bits - 1 - S) / 2. What integers codes stand for:
//
//   form       integers                           code                  integer
//   kUnsigned  0 ... 2^bits - 1                   q                     (2^bits - 1 - S) / 2
//   kSigned    -2^(bits - 1) ... 2^(bits - 1) - 1 q + 2^(bits - 1)      (-1 - S) / 2
//   kOdd       -(2^bits - 1) ... 2^bits - 1, odd  (2^bits - 1 - q) / 2  S
//
// kOdd of one bit is +-1 as the binary kernels store it, of more bits DoReFa-Net's weights.
//
// A product of two such rows a and b, of K integers in P and Q planes: each integer is d code + z, d and z given by the
// form (d = 1, 1, -2; z = 0, -2^(bits - 1), 2^bits - 1). With X = sum of 2^(p + q) popcount(a_p xor b_q), the sum of
// products of codes is ((2^Q - 1) sum(code a) + (2^P - 1) sum(code b) - X) / 2, hence, with e = d (2^bits - 1) + 2 z,
// which is 2^bits - 1, -1 and 0,
//   2 a.b = e_b sum(a) + e_a sum(b) - K (e_b z_a + e_a z_b - 2 z_a z_b) - d_a d_b X.
// X is made plane by plane as in Horner's scheme: counts of the pairs with the largest p + q first, doubled before
// those with the next. Counts wrap modulo 2^32; the result is exact since twice a.b fits int32, which is checked.
#pragma once

#include "kdq/binary_gemm.h"
#include "kdq/parallel.h"
#include "kdq/status.h"
#include "kdq/types.h"

namespace kdq {

enum class PlaneForm : int { kUnsigned = 0, kSigned = 1, kOdd = 2 };

constexpr int kMostPlaneBits = 8;
constexpr int kMostOddBits = 7;  // int8 does not hold the odd integers of 8

// q, int8 or (kUnsigned) uint8 [rows, k], -> planes [bits, rows, binary_words(k)]. Elements that are no integers of the
// form are refused.
KDQ_API Status pack_bitplanes(const void* q, int64_t rows, int64_t k, int bits, PlaneForm form, uint64_t* planes,
                              const ParallelFor& parallel_for);

// The inverse of pack_bitplanes. q: int8, or uint8 for kUnsigned.
KDQ_API Status unpack_bitplanes(const uint64_t* planes, int64_t rows, int64_t k, int bits, PlaneForm form, void* q,
                                const ParallelFor& parallel_for);

// A matrix in planes.
struct PlaneMatrix {
  const uint64_t* planes = nullptr;  // [bits, rows, binary_words(k)]
  int64_t rows = 0;
  int bits = 1;
  PlaneForm form = PlaneForm::kUnsigned;
};

// out int32 [a.rows, b.rows] = a @ b.T, exact. 2 K max|a| max|b| < 2^31.
KDQ_API Status bitplane_matmul(const PlaneMatrix& a, const PlaneMatrix& b, int64_t k, int32_t* out,
                               const ParallelFor& parallel_for);

// y [m, n] = activation((q @ w.T - zero points) * input_scale * weight_scale + bias), in the dtype of x: what a static
// int8_linear() of the same integers gives, to the last bit, as long as input_scale and its products with weight_scale
// are at least 2^-120 and finite (from weights packed in few bits, int8_linear() takes 2^-6 into the first). Rows are
// quantized inside, in as many planes as input_quant_max has bits.
struct BitplaneLinear {
  DType dtype = DType::kFloat32;  // of x and y
  const void* x = nullptr;        // [m, k]
  void* y = nullptr;              // [m, n]
  int64_t m = 0;
  int64_t k = 0;
  PlaneMatrix weight;                   // [n, k]
  const int32_t* weight_sum = nullptr;  // [n]: of the integers of each output channel
  const float* weight_scale = nullptr;  // [n], positive and finite
  const float* bias = nullptr;          // [n], or nullptr
  Activation activation = Activation::kNone;
  float input_scale = 1.0F;  // the grid, as of Int8Linear
  int32_t input_zero_point = 0;
  int32_t input_quant_max = 3;
};

KDQ_API Status bitplane_linear(const BitplaneLinear& args, const ParallelFor& parallel_for);

// The most pairs of planes, P * Q, with which a layer of many rows takes less time so than by int8_linear() of few-bit
// weights, by the kernels in force; 0: none.
KDQ_API Status bitplane_pairs(int* pairs);

}  // namespace kdq
