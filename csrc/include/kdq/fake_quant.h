// fake_quant: quantize, dequantize, fake-quantize and its gradients.
//
//   q    = clamp(nearbyint(x * (1 / scale)) + zero_point, quant_min, quant_max)     half-to-even
//   fake = (q - zero_point) * scale
//
// The bits of fake are those of torch.fake_quantize_per_{tensor,channel}_affine for finite float32 input (where
// |x / scale| >= 2^63 torch's per-channel kernel wraps to quant_min; here it clamps to the near end). bfloat16 and
// float16 are widened to float32, computed there, and rounded half-to-even on the way back. NaN propagates through
// fake_quantize and becomes the zero point in quantize; +-inf clamps.
//
// A float zero point (learned, LSQ+) is rounded half-to-even and clamped to [quant_min, quant_max] before use.
#pragma once

#include "kdq/parallel.h"
#include "kdq/status.h"
#include "kdq/types.h"

namespace kdq {

// A dense buffer seen as [outer, channels, inner]: element (o, c, i) lies at (o * channels + c) * inner + i and uses
// scale[c]. Per tensor: {1, 1, n}. Per channel on an axis: the sizes before, at and after it. Per group of g along the
// last axis: {1, n / g, g}.
struct QuantShape {
  int64_t outer = 1;
  int64_t channels = 1;
  int64_t inner = 0;
};

enum class ZeroPointKind : int { kNone = 0, kInt32 = 1, kFloat32 = 2 };

// The grid onto which values are rounded. quant_min and quant_max must lie in [-2^23, 2^23], so that every step of the
// arithmetic above is exact in float32; quant_min <= 0 <= quant_max is not required, quant_min < quant_max is.
struct QuantGrid {
  const float* scale = nullptr;      // [channels]; positive, finite, with a finite reciprocal
  const void* zero_point = nullptr;  // [channels] int32 or float32; nullptr with kNone
  ZeroPointKind zero_point_kind = ZeroPointKind::kNone;
  int32_t quant_min = -128;
  int32_t quant_max = 127;
};

// x, y: dense buffers of the shape, dtype each. y may be x.
KDQ_API Status fake_quantize(DType dtype, const void* x, void* y, const QuantShape& shape, const QuantGrid& grid,
                             const ParallelFor& parallel_for);

// Straight-through gradients, all in one pass over x and grad_y; nothing but x is needed from the forward pass.
//   grad_x     = inside ? grad_y : 0                   inside: the rounded integer, before clamping, is on the grid
//   grad_scale = sum grad_y * (inside ? (fake - x) / scale : q - zero_point)
//   grad_zero_point = sum grad_y * (inside ? 0 : -scale)
// as torch's learnable fake-quant with grad_factor 1 (Esser et al. 2020, LSQ; Bhalgat et al. 2020, LSQ+). Sums run in
// an order that depends on the shape alone. grad_x, grad_scale [channels], grad_zero_point [channels]: any may be null.
// grad_x may be grad_y.
KDQ_API Status fake_quantize_backward(DType dtype, const void* grad_y, const void* x, void* grad_x, float* grad_scale,
                                      float* grad_zero_point, const QuantShape& shape, const QuantGrid& grid,
                                      const ParallelFor& parallel_for);

// q: the integers themselves. The grid must fit qtype.
KDQ_API Status quantize(DType dtype, const void* x, QType qtype, void* q, const QuantShape& shape,
                        const QuantGrid& grid, const ParallelFor& parallel_for);

// y = (q - zero_point) * scale, float32. The grid's quant_min and quant_max are not used, but for clamping a float
// zero point.
KDQ_API Status dequantize(QType qtype, const void* q, float* y, const QuantShape& shape, const QuantGrid& grid,
                          const ParallelFor& parallel_for);

// Dynamic symmetric quantization, one scale a row: x [rows, cols] -> q int8 [rows, cols] in [-127, 127], scale [rows].
//   scale = max(max|x| / 127, FLT_MIN),  q = clamp(nearbyint(x * (1 / scale)), -127, 127)
// The floor keeps rows of zeros and of denormals finite. A row with a NaN or inf gets a NaN or inf scale and q = 0,
// so that everything computed from that row is NaN, and no other row is touched.
KDQ_API Status quantize_rows(DType dtype, const void* x, int64_t rows, int64_t cols, int8_t* q, float* scale,
                             const ParallelFor& parallel_for);

// The same rounded back: y = q * scale, in one call. A row with a NaN or inf becomes NaN. Nothing is clipped, so the
// straight-through gradient is the identity.
KDQ_API Status fake_quantize_rows(DType dtype, const void* x, int64_t rows, int64_t cols, void* y,
                                  const ParallelFor& parallel_for);

// Binarization for training: signs = x < 0 ? -1 : 1, and mean[r] = mean of |x| over row r (0 for rows without
// elements), which is XNOR-Net's scale of a channel (Rastegari et al. 2016).
KDQ_API Status binarize_rows(DType dtype, const void* x, int64_t rows, int64_t cols, void* signs, float* mean,
                             const ParallelFor& parallel_for);

// Straight-through for the signs where |x| <= 1 (Courbariaux et al. 2016), exact for the mean:
//   grad_x = (|x| <= 1 ? grad_signs : 0) + grad_mean[r] / cols * (x > 0 ? 1 : x < 0 ? -1 : 0)
// Either gradient may be null, which means 0. grad_x may be grad_signs.
KDQ_API Status binarize_rows_backward(DType dtype, const void* grad_signs, const float* grad_mean, const void* x,
                                      int64_t rows, int64_t cols, void* grad_x, const ParallelFor& parallel_for);

// Gradient of y = signs * mean[r], the two of binarize_rows multiplied:
//   grad_x = (|x| <= 1 ? grad_y * mean[r] : 0) + sum(grad_y * signs over row r) / cols * (x > 0 ? 1 : x < 0 ? -1 : 0)
// grad_x may be grad_y.
KDQ_API Status scaled_signs_backward(DType dtype, const void* grad_y, const void* x, int64_t rows, int64_t cols,
                                     void* grad_x, const ParallelFor& parallel_for);

}  // namespace kdq
