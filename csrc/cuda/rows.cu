// The members of the fake-quant family whose scale comes from the row itself: the public functions on a GPU.
#include "cuda/binarize_rows.h"
#include "cuda/launch.h"
#include "cuda/quantize_rows.h"

namespace kdq::cuda {

Status quantize_rows(DType dtype, const void* x, int64_t rows, int64_t cols, int8_t* q, float* scale, Stream stream) {
  return launch_quantize_rows(StreamLauncher(stream), dtype, x, rows, cols, q, scale);
}

Status fake_quantize_rows(DType dtype, const void* x, int64_t rows, int64_t cols, void* y, Stream stream) {
  return launch_fake_quantize_rows(StreamLauncher(stream), dtype, x, rows, cols, y);
}

Status binarize_rows(DType dtype, const void* x, int64_t rows, int64_t cols, void* signs, float* mean, Stream stream) {
  return launch_binarize_rows(StreamLauncher(stream), dtype, x, rows, cols, signs, mean);
}

Status binarize_rows_backward(DType dtype, const void* grad_signs, const float* grad_mean, const void* x, int64_t rows,
                              int64_t cols, void* grad_x, Stream stream) {
  return launch_binarize_rows_backward(StreamLauncher(stream), dtype, grad_signs, grad_mean, x, rows, cols, grad_x);
}

Status scaled_signs_backward(DType dtype, const void* grad_y, const void* x, int64_t rows, int64_t cols, void* grad_x,
                             Stream stream) {
  return launch_scaled_signs_backward(StreamLauncher(stream), dtype, grad_y, x, rows, cols, grad_x);
}

}  // namespace kdq::cuda
