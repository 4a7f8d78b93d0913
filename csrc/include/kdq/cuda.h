// The kernels on NVIDIA GPUs, under the same names: libkdq_cuda, find_package(kdq)'s kdq::kdq_cuda. Formulas, layouts
// and rounding are those of the headers of the CPU kernels; integers and fake-quantized values have the same bits.
//
// Every pointer is to device memory, and workspaces are multiples of 16 bytes from the start of an allocation.
// Functions check what they can without reading device memory (shapes, ranges, null), put their kernels on the stream
// and return; an error while a kernel runs is reported by CUDA later. Not checked, as it would wait for the GPU: that
// scales are positive and finite, those of static activations included where they are on the device; that zero points
// lie on the grid; that codebook entries are finite; that the tail bits of binary rows are zero. Results then are
// unspecified, but no memory outside the buffers is touched.
//
// Any alignment works; rows and buffers that are multiples of 16 bytes are fastest. sm_80 (Ampere) or newer.
#pragma once

#include "kdq/binary_gemm.h"
#include "kdq/bitplanes.h"
#include "kdq/codebook.h"
#include "kdq/conv2d.h"
#include "kdq/distillation.h"
#include "kdq/fake_quant.h"
#include "kdq/int8_gemm.h"

struct CUstream_st;

namespace kdq::cuda {

// A cudaStream_t; nullptr is the default stream. The device is the current one of the calling thread.
using Stream = CUstream_st*;

// ---- fake_quant.h: grid.scale and grid.zero_point are on the device too --------------------------------------------

// y may be x.
KDQ_API Status fake_quantize(DType dtype, const void* x, void* y, const QuantShape& shape, const QuantGrid& grid,
                             Stream stream);

KDQ_API Status quantize(DType dtype, const void* x, QType qtype, void* q, const QuantShape& shape,
                        const QuantGrid& grid, Stream stream);

KDQ_API Status dequantize(QType qtype, const void* q, float* y, const QuantShape& shape, const QuantGrid& grid,
                          Stream stream);

// Bytes of the workspace that fake_quantize_backward needs; 0 where it may be null, which it may be too if neither
// grad_scale nor grad_zero_point is asked for.
KDQ_API size_t fake_quantize_backward_workspace(const QuantShape& shape);

// The sums' order depends on the shape alone: the same bits in every run and on every GPU.
KDQ_API Status fake_quantize_backward(DType dtype, const void* grad_y, const void* x, void* grad_x, float* grad_scale,
                                      float* grad_zero_point, const QuantShape& shape, const QuantGrid& grid,
                                      void* workspace, Stream stream);

KDQ_API Status quantize_rows(DType dtype, const void* x, int64_t rows, int64_t cols, int8_t* q, float* scale,
                             Stream stream);

// y may be x.
KDQ_API Status fake_quantize_rows(DType dtype, const void* x, int64_t rows, int64_t cols, void* y, Stream stream);

KDQ_API Status binarize_rows(DType dtype, const void* x, int64_t rows, int64_t cols, void* signs, float* mean,
                             Stream stream);

KDQ_API Status binarize_rows_backward(DType dtype, const void* grad_signs, const float* grad_mean, const void* x,
                                      int64_t rows, int64_t cols, void* grad_x, Stream stream);

KDQ_API Status scaled_signs_backward(DType dtype, const void* grad_y, const void* x, int64_t rows, int64_t cols,
                                     void* grad_x, Stream stream);

// ---- binary_gemm.h --------------------------------------------------------------------------------------------------

KDQ_API Status pack_signs(DType dtype, const void* x, int64_t rows, int64_t k, uint64_t* bits, Stream stream);

KDQ_API Status unpack_signs(const uint64_t* bits, int64_t rows, int64_t k, float* x, Stream stream);

KDQ_API Status binary_matmul(const uint64_t* a_bits, const uint64_t* b_bits, int64_t m, int64_t n, int64_t k,
                             int32_t* out, Stream stream);

// Bytes of the workspace that the two layers need; it may be null where they get x_bits.
KDQ_API size_t binary_layer_workspace(int64_t m, int64_t k);

KDQ_API Status binary_linear(const BinaryLinear& args, void* workspace, Stream stream);

KDQ_API Status binary_threshold(const BinaryThreshold& args, void* workspace, Stream stream);

// ---- bitplanes.h ----------------------------------------------------------------------------------------------------

// Of integers that are none of the form, the lower bits of a code count, unchecked.
KDQ_API Status pack_bitplanes(const void* q, int64_t rows, int64_t k, int bits, PlaneForm form, uint64_t* planes,
                              Stream stream);

KDQ_API Status unpack_bitplanes(const uint64_t* planes, int64_t rows, int64_t k, int bits, PlaneForm form, void* q,
                                Stream stream);

KDQ_API size_t bitplane_matmul_workspace(int64_t m, int64_t n);

KDQ_API Status bitplane_matmul(const PlaneMatrix& a, const PlaneMatrix& b, int64_t k, int32_t* out, void* workspace,
                               Stream stream);

// Numbers of the grid may also be on the device: input_scale_at, input_zero_point_at, if not null, count instead,
// unchecked.
struct BitplaneLinear {
  kdq::BitplaneLinear layer;
  void* workspace = nullptr;  // bitplane_linear_workspace(m, k, input_quant_max) bytes
  const float* input_scale_at = nullptr;
  const int32_t* input_zero_point_at = nullptr;
};

KDQ_API size_t bitplane_linear_workspace(int64_t m, int64_t k, int32_t input_quant_max);

KDQ_API Status bitplane_linear(const BitplaneLinear& args, Stream stream);

// ---- int8_gemm.h: weights are row-major, not packed -----------------------------------------------------------------

// Bytes of the workspace of int8_matmul; 0 where k is not split for it.
KDQ_API size_t int8_matmul_workspace(int64_t m, int64_t n, int64_t k);

// out int32 [m, n] = a int8 [m, k] @ b.T, b int8 [n, k]; exact. k <= kInt8MaxK. workspace may be null: the result is
// the same, but a product of few tiles keeps few multiprocessors busy.
KDQ_API Status int8_matmul(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k, int32_t* out,
                           void* workspace, Stream stream);

// y [m, n] = activation((q @ weight.T - zero points) * row_scale * weight_scale + bias), in the dtype of x. kGelu is
// the erf-based form.
struct Int8Linear {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // [m, k]
  void* y = nullptr;        // [m, n]
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;                        // <= kInt8MaxK, or kInt8StaticMaxK
  const int8_t* weight = nullptr;       // [n, k]
  const float* weight_scale = nullptr;  // [n]
  const float* bias = nullptr;          // [n], or nullptr
  Activation activation = Activation::kNone;
  void* workspace = nullptr;  // int8_linear_workspace(m, n, k) bytes

  // As in kdq::Int8Linear. A number may also be on the device: input_scale_at, input_zero_point_at, if not null, count
  // instead, unchecked.
  bool is_static = false;
  float input_scale = 1.0F;
  int32_t input_zero_point = 0;
  int32_t input_quant_max = 255;
  const float* input_scale_at = nullptr;
  const int32_t* input_zero_point_at = nullptr;
};

KDQ_API size_t int8_linear_workspace(int64_t m, int64_t n, int64_t k);

KDQ_API Status int8_linear(const Int8Linear& args, Stream stream);

// As in int8_gemm.h: x stays in floating point. It needs no workspace. The order of the float32 sums depends on the
// shape alone, and is not the CPU's.
KDQ_API Status int8_weight_only_linear(const Int8Linear& args, Stream stream);

// ---- conv2d.h: images channels last ---------------------------------------------------------------------------------

// The int8 layer over the windows of images. weight: [n, kernel height * kernel width * channels]; m and k follow from
// the shape; workspace: int8_conv2d_workspace(shape, layer.n) bytes. Less than 2^31 outputs of a channel, as everywhere
// here.
struct Int8Conv2d {
  Conv2dShape shape;
  Int8Linear layer;
};

// 0 for a shape that the functions refuse.
KDQ_API size_t int8_conv2d_workspace(const Conv2dShape& shape, int64_t n);

KDQ_API Status int8_conv2d(const Int8Conv2d& args, Stream stream);

KDQ_API size_t binary_conv2d_workspace(const Conv2dShape& shape, int64_t n);

KDQ_API Status binary_conv2d(const BinaryConv2d& args, void* workspace, Stream stream);

KDQ_API Status transpose_images(size_t element_bytes, const void* x, int64_t images, int64_t rows, int64_t columns,
                                void* y, Stream stream);

// ---- codebook.h -----------------------------------------------------------------------------------------------------

// Of an index that is not below 2^bits, the lower bits count.
KDQ_API Status pack_indices(const uint8_t* indices, int64_t n, int64_t k, int bits, uint32_t* packed, Stream stream);

KDQ_API Status unpack_indices(const uint32_t* packed, int64_t n, int64_t k, int bits, uint8_t* indices, Stream stream);

// The order of the float32 sums depends on the shape alone, and is not the CPU's. With more than 16 rows of 16-bit
// x, an infinity in x may make the results of its row NaN; with bfloat16, an entry counts to 16 bits.
KDQ_API Status codebook_linear(const CodebookLinear& args, Stream stream);

// ---- distillation.h -------------------------------------------------------------------------------------------------

// statistics, row_losses: [rows], written; row_losses is scratch. loss: the scalar. kept: how many rows are not
// ignored, for the backward pass. A target that is no class makes its row, and so the loss, NaN.
KDQ_API Status distillation_loss(const DistillationLoss& args, DistillationRow* statistics, double* row_losses,
                                 float* loss, float* kept, Stream stream);

// What distillation_loss wrote to kept, for who did not keep it.
KDQ_API Status distillation_kept(const int64_t* target, int64_t rows, float* kept, Stream stream);

// grad_loss: the gradient of the scalar loss. grad_student: [rows, classes] of dtype; may be args.student.
KDQ_API Status distillation_loss_backward(const DistillationLoss& args, const DistillationRow* statistics,
                                          const float* kept, const float* grad_loss, void* grad_student, Stream stream);

// ---- what a GPU can do at most: work to be timed --------------------------------------------------------------------

// Instructions on registers: mma.sync m16n8k32 on int8, m16n8k256 on bits (and), m16n8k16 on bfloat16, and float32
// fused multiply-add. On Hopper and newer, mma.sync does not reach what wgmma can.
enum class PeakLoop { kInt8, kBinary, kBFloat16, kFloat32 };

constexpr int kPeakThreads = 256;  // of a block

// `steps` steps by each of the blocks; some four blocks a multiprocessor keep it busy. operations: how many the launch
// does, a multiply-accumulate counting two. out: [blocks, kPeakThreads], of no use but to keep the loop.
KDQ_API Status arithmetic_peak(PeakLoop loop, int64_t blocks, int64_t steps, float* out, int64_t* operations,
                               Stream stream);

// Reads all of source, a multiple of 16 bytes, once; out: [blocks, kPeakThreads].
KDQ_API Status read_peak(const void* source, int64_t bytes, int64_t blocks, uint32_t* out, Stream stream);

}  // namespace kdq::cuda
