// conv2d: 2d convolutions on the int8 and binary products.
//
// Everywhere: images channels last, x [images, height, width, channels], y [images, output height, output width, n];
// every image is padded with zeros. A convolution is a product whose rows are the windows of the kernel, and whose k
// runs over the kernel's height, its width and the channels, in this order: so weights are given. Windows are gathered
// while rows are prepared, a tile at a time, and never lie in memory all at once.
#pragma once

#include "kdq/binary_gemm.h"
#include "kdq/int8_gemm.h"
#include "kdq/parallel.h"
#include "kdq/status.h"

namespace kdq {

struct Conv2dShape {
  int64_t images = 0;
  int64_t channels = 0;
  int64_t height = 0;  // of an image
  int64_t width = 0;
  int64_t kernel_height = 1;
  int64_t kernel_width = 1;
  int64_t stride_height = 1;
  int64_t stride_width = 1;
  int64_t padding_height = 0;  // at the top and at the bottom
  int64_t padding_width = 0;
  int64_t dilation_height = 1;
  int64_t dilation_width = 1;
};

// Checks a shape, and that it leaves at least one output in each direction.
KDQ_API Status conv2d_output(const Conv2dShape& shape, int64_t* height, int64_t* width);

// The int8 layer over the windows of images.
struct Int8Conv2d {
  Conv2dShape shape;

  // As of a linear layer, but for x and y (see above); m and k follow from the shape. Dynamic: one symmetric scale an
  // image, max|x| / 127, so that an image's outputs do not depend on the others. NaN, or dynamically inf, in an image
  // makes all of its outputs NaN. k <= kInt8StaticMaxK.
  Int8Linear layer;
};

KDQ_API Status int8_conv2d(const Int8Conv2d& args, const ParallelFor& parallel_for);

// The binary layer over the windows of images: signs of x, while padding counts as 0, exactly.
struct BinaryConv2d {
  Conv2dShape shape;

  // As of a linear layer, but for x, y and weight_bits: [n, kernel height, kernel width, binary_words(channels)], tail
  // bits zero. x_bits is not used; m and k follow from the shape.
  BinaryLinear layer;
};

KDQ_API Status binary_conv2d(const BinaryConv2d& args, const ParallelFor& parallel_for);

// x [images, rows, columns] -> y [images, columns, rows], of elements of 2 or 4 bytes: images with their channels first
// to images with their channels last (rows: channels, columns: pixels), and back.
KDQ_API Status transpose_images(size_t element_bytes, const void* x, int64_t images, int64_t rows, int64_t columns,
                                void* y, const ParallelFor& parallel_for);

}  // namespace kdq
