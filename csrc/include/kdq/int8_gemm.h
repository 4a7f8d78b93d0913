// int8_gemm: exact integer matrix products and the linear layers made of them.
//
// Everywhere: activations [M, K] row-major, weights [N, K] row-major (as in torch.nn.Linear), results [M, N] row-major.
// Weights are packed once, on the machine that runs them, into an opaque blob: a 64-byte header, the int32 sum of each
// output channel's weights, and the weights in the order in which the kernel of the ISA in force reads them. A blob of
// another layout (other ISA, other version) is refused. Blobs are not for storage: store row-major int8 and pack on
// load.
//
// Integer accumulators are exact: for every int8 value, -128 included, every ISA gives the same int32.
#pragma once

#include "kdq/parallel.h"
#include "kdq/status.h"
#include "kdq/types.h"

namespace kdq {

// 128 * 128 * K must fit int32.
constexpr int64_t kInt8MaxK = 131071;
// 255 * 128 * K must fit int32 (static activations are unsigned).
constexpr int64_t kInt8StaticMaxK = 65535;

// How many bytes a packed [n, k] weight takes in the layout of the ISA in force. bits: of a value, 8, 4 or 2.
KDQ_API Status int8_packed_bytes(int64_t n, int64_t k, size_t* bytes, int bits = 8);

// w: int8 [n, k] -> packed, a buffer of at least int8_packed_bytes(n, k, bits). 64-byte alignment helps but is not
// needed. With fewer than 8 bits, values are -2^(bits - 1) ... 2^(bits - 1) - 1, and int8_linear and int8_conv2d read
// that many bits of each from memory, which with few rows is what takes the time; their results are the same.
KDQ_API Status pack_int8_weight(const int8_t* w, int64_t n, int64_t k, void* packed, size_t packed_bytes,
                                const ParallelFor& parallel_for, int bits = 8);

// Reads a blob's shape after checking that it is whole and was made for the ISA in force.
KDQ_API Status int8_packed_shape(const void* packed, size_t packed_bytes, int64_t* n, int64_t* k);

// The inverse of pack_int8_weight, bit for bit. w: int8 [n, k].
KDQ_API Status unpack_int8_weight(const void* packed, size_t packed_bytes, int8_t* w, const ParallelFor& parallel_for);

// out int32 [m, n] = a int8 [m, k] @ w.T, exact.
KDQ_API Status int8_matmul(const int8_t* a, int64_t m, int64_t k, const void* packed, size_t packed_bytes, int32_t* out,
                           const ParallelFor& parallel_for);

// y [m, n] = activation((q @ w.T - zero points) * row_scale * weight_scale + bias), in the dtype of x.
struct Int8Linear {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // [m, k]
  void* y = nullptr;        // [m, n]
  int64_t m = 0;
  int64_t k = 0;
  const void* packed = nullptr;  // of an [n, k] weight
  size_t packed_bytes = 0;
  const float* weight_scale = nullptr;  // [n], positive and finite
  const float* bias = nullptr;          // [n], or nullptr
  Activation activation = Activation::kNone;

  // Dynamic (is_static = false): each row is quantized as by quantize_rows(). k <= kInt8MaxK.
  // Static: q = clamp(nearbyint(x * (1 / input_scale)) + input_zero_point, 0, input_quant_max), unsigned, the same for
  // the whole tensor; input_quant_max < 255 gives activations of fewer bits. NaN becomes NaN in that row's outputs.
  // k <= kInt8StaticMaxK.
  bool is_static = false;
  float input_scale = 1.0F;
  int32_t input_zero_point = 0;
  int32_t input_quant_max = 255;
};

// The float result is acc * (row_scale * weight_scale) + bias, acc the exact int32: finite input gives finite output
// wherever the true result is finite. It may differ between ISAs by float rounding, never between thread counts.
KDQ_API Status int8_linear(const Int8Linear& args, const ParallelFor& parallel_for);

// y = activation((x @ w.T) * weight_scale + bias) with x left in floating point (products and sums in float32): the
// weight is widened in registers, so that a quarter of a float32 weight's bytes are read. The is_static fields are not
// used. On CPUs with AVX-512 BF16, bfloat16 x is multiplied as it is: the same exact products, added up in float32 in
// another order, numbers below FLT_MIN counting as 0.
KDQ_API Status int8_weight_only_linear(const Int8Linear& args, const ParallelFor& parallel_for);

}  // namespace kdq
