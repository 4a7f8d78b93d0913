// The public functions of the fake-quant family on a GPU, but for the rows: rows.cu.
#include "cuda/fake_quantize.h"
#include "cuda/fake_quantize_backward.h"
#include "cuda/launch.h"

namespace kdq::cuda {

Status fake_quantize(DType dtype, const void* x, void* y, const QuantShape& shape, const QuantGrid& grid,
                     Stream stream) {
  return launch_fake_quantize(StreamLauncher(stream), dtype, x, y, shape, grid);
}

Status quantize(DType dtype, const void* x, QType qtype, void* q, const QuantShape& shape, const QuantGrid& grid,
                Stream stream) {
  return launch_quantize(StreamLauncher(stream), dtype, x, qtype, q, shape, grid);
}

Status dequantize(QType qtype, const void* q, float* y, const QuantShape& shape, const QuantGrid& grid, Stream stream) {
  return launch_dequantize(StreamLauncher(stream), qtype, q, y, shape, grid);
}

size_t fake_quantize_backward_workspace(const QuantShape& shape) { return backward_workspace_bytes(shape); }

Status fake_quantize_backward(DType dtype, const void* grad_y, const void* x, void* grad_x, float* grad_scale,
                              float* grad_zero_point, const QuantShape& shape, const QuantGrid& grid, void* workspace,
                              Stream stream) {
  return launch_fake_quantize_backward(StreamLauncher(stream), dtype, grad_y, x, grad_x, grad_scale, grad_zero_point,
                                       shape, grid, workspace);
}

}  // namespace kdq::cuda
