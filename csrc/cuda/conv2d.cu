// Convolutions on a GPU: the public functions.
#include "cuda/binary_conv2d.h"
#include "cuda/int8_conv2d.h"
#include "cuda/launch.h"
#include "cuda/transpose_images.h"

namespace kdq::cuda {

size_t int8_conv2d_workspace(const Conv2dShape& shape, int64_t n) {
  Int8ConvPlan plan;
  return plan_int8_conv2d(shape, n, &plan).ok() ? plan.bytes : 0;
}

Status int8_conv2d(const Int8Conv2d& args, Stream stream) { return launch_int8_conv2d(StreamLauncher(stream), args); }

size_t binary_conv2d_workspace(const Conv2dShape& shape, int64_t n) {
  BinaryConv2d args;
  args.shape = shape;
  args.layer.n = n;
  BinaryConvPlan plan;
  return plan_binary_conv2d(args, &plan).ok() ? plan.bytes : 0;
}

Status binary_conv2d(const BinaryConv2d& args, void* workspace, Stream stream) {
  return launch_binary_conv2d(StreamLauncher(stream), args, workspace);
}

Status transpose_images(size_t element_bytes, const void* x, int64_t images, int64_t rows, int64_t columns, void* y,
                        Stream stream) {
  return launch_transpose_images(StreamLauncher(stream), element_bytes, x, images, rows, columns, y);
}

}  // namespace kdq::cuda
