// What an ISA provides for the fake-quant family: loops over contiguous elements, in two forms. *Uniform*: one scale
// for the whole run. *Each*: element i has scale[i]. The core cuts every layout into such runs.
#pragma once

#include <cstdint>

#include "core/elements.h"
#include "kdq/types.h"

namespace kdq {

enum GridForm : int { kUniform = 0, kEach = 1 };

// One element of each array for kUniform, n for kEach. zero_point is already rounded and clamped; it is 0 where the
// caller gave none, and adding that +0.0 turns a rounded -0.0 into the +0.0 that an integer would be.
struct RunGrid {
  const float* scale;
  const float* inverse;  // 1 / scale
  const float* zero_point;
  float quant_min;
  float quant_max;
};

// Indexed [DType], [QType] and [GridForm]; the last index of forward and backward is 1 for a result that goes past the
// caches: its address is then a multiple of kStreamAlignment.
struct FakeQuantKernels {
  // `rows` runs of n elements, `stride` elements from one to the next, all on the same grid.
  void (*forward[3][2][2])(const void* x, void* y, int64_t n, const RunGrid& grid, int64_t rows, int64_t stride);

  // grad_x may be null, or grad_y. kUniform: writes one sum to each of scale_sum and zero_point_sum (n <=
  // kBackwardBlock, so that float32 sums stay accurate). kEach: adds to scale_sum[i] and zero_point_sum[i].
  void (*backward[3][2][2])(const void* grad_y, const void* x, void* grad_x, int64_t n, const RunGrid& grid,
                            float* scale_sum, float* zero_point_sum);

  void (*quantize[3][3][2])(const void* x, void* q, int64_t n, const RunGrid& grid);
  void (*dequantize[3][2])(const void* q, float* y, int64_t n, const RunGrid& grid);

  // One row: returns its scale.
  float (*quantize_row[3])(const void* x, int64_t n, int8_t* q);
  void (*fake_quantize_row[3])(const void* x, int64_t n, void* y);
  // Part of a row, n <= kBackwardBlock: returns the sum of |x|.
  float (*binarize[3])(const void* x, int64_t n, void* signs);
  // Part of a row, n <= kBackwardBlock: the sum of |x| and of grad * sign(x).
  void (*binarize_sums[3])(const void* grad, const void* x, int64_t n, float* magnitude, float* product);
  // (|x| <= 1 ? grad * scale : 0) + mean_step * (sign of x or 0). grad may be null, and grad_x may be grad.
  void (*binarize_backward[3])(const void* grad, float scale, float mean_step, const void* x, int64_t n, void* grad_x);
};

// Elements of one partial sum in backward. Sums within a block run in the ISA's lane order, blocks are added in
// float64: the order depends on the shape alone.
constexpr int64_t kBackwardBlock = 4096;

constexpr int64_t kStreamAlignment = 64;

// The table of an ISA whose loops are the static members of L, templates on element type and grid form. L lives in
// an anonymous namespace, so nothing here has external linkage.
template <class L>
constexpr FakeQuantKernels make_fake_quant_kernels() {
  return {
      {{{L::template forward<float, kUniform, false>, L::template forward<float, kUniform, true>},
        {L::template forward<float, kEach, false>, L::template forward<float, kEach, true>}},
       {{L::template forward<BFloat16, kUniform, false>, L::template forward<BFloat16, kUniform, true>},
        {L::template forward<BFloat16, kEach, false>, L::template forward<BFloat16, kEach, true>}},
       {{L::template forward<Float16, kUniform, false>, L::template forward<Float16, kUniform, true>},
        {L::template forward<Float16, kEach, false>, L::template forward<Float16, kEach, true>}}},
      {{{L::template backward<float, kUniform, false>, L::template backward<float, kUniform, true>},
        {L::template backward<float, kEach, false>, L::template backward<float, kEach, true>}},
       {{L::template backward<BFloat16, kUniform, false>, L::template backward<BFloat16, kUniform, true>},
        {L::template backward<BFloat16, kEach, false>, L::template backward<BFloat16, kEach, true>}},
       {{L::template backward<Float16, kUniform, false>, L::template backward<Float16, kUniform, true>},
        {L::template backward<Float16, kEach, false>, L::template backward<Float16, kEach, true>}}},
      {{{L::template quantize<float, int8_t, kUniform>, L::template quantize<float, int8_t, kEach>},
        {L::template quantize<float, uint8_t, kUniform>, L::template quantize<float, uint8_t, kEach>},
        {L::template quantize<float, int32_t, kUniform>, L::template quantize<float, int32_t, kEach>}},
       {{L::template quantize<BFloat16, int8_t, kUniform>, L::template quantize<BFloat16, int8_t, kEach>},
        {L::template quantize<BFloat16, uint8_t, kUniform>, L::template quantize<BFloat16, uint8_t, kEach>},
        {L::template quantize<BFloat16, int32_t, kUniform>, L::template quantize<BFloat16, int32_t, kEach>}},
       {{L::template quantize<Float16, int8_t, kUniform>, L::template quantize<Float16, int8_t, kEach>},
        {L::template quantize<Float16, uint8_t, kUniform>, L::template quantize<Float16, uint8_t, kEach>},
        {L::template quantize<Float16, int32_t, kUniform>, L::template quantize<Float16, int32_t, kEach>}}},
      {{L::template dequantize<int8_t, kUniform>, L::template dequantize<int8_t, kEach>},
       {L::template dequantize<uint8_t, kUniform>, L::template dequantize<uint8_t, kEach>},
       {L::template dequantize<int32_t, kUniform>, L::template dequantize<int32_t, kEach>}},
      {L::template quantize_row<float>, L::template quantize_row<BFloat16>, L::template quantize_row<Float16>},
      {L::template fake_quantize_row<float>, L::template fake_quantize_row<BFloat16>,
       L::template fake_quantize_row<Float16>},
      {L::template binarize<float>, L::template binarize<BFloat16>, L::template binarize<Float16>},
      {L::template binarize_sums<float>, L::template binarize_sums<BFloat16>, L::template binarize_sums<Float16>},
      {L::template binarize_backward<float>, L::template binarize_backward<BFloat16>,
       L::template binarize_backward<Float16>},
  };
}

extern const FakeQuantKernels kFakeQuantReference;
extern const FakeQuantKernels kFakeQuantAvx2;
extern const FakeQuantKernels kFakeQuantAvx512;

}  // namespace kdq
