// Images as torch has them, [images, channels, height, width] in any memory format, and as the convolutions of
// kdq/conv2d.h take them: channels last.
#pragma once

#include <vector>

#include "kdq/conv2d.h"
#include "torch_common.h"

namespace kdq::bindings {

using Pair = std::vector<int64_t>;

// The arguments of a convolution that are pairs: of the height and the width.
struct ConvArguments {
  const Pair& stride;
  const Pair& padding;
  const Pair& dilation;
};

struct Images {
  Tensor x;  // [images, channels, height, width], or, where it has been transposed, [images, height, width, channels]
  DType dtype;
  Conv2dShape shape;
  bool result_channels_last;  // results have the memory format of x; where it is both, they are contiguous
  int64_t output_height = 0;
  int64_t output_width = 0;
};

inline void check_pair(const char* name, const Pair& pair) {
  if (pair.size() != 2) invalid(std::string(name) + ": expected two numbers, got " + std::to_string(pair.size()));
}

// Axes of one element may have any stride.
inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (const int64_t axis : {1, 3, 2, 0}) {
    if (x.size(axis) == 1) continue;
    if (x.stride(axis) != expected) return false;
    expected *= x.size(axis);
  }
  return true;
}

// x [images, channels, height, width], contiguous -> [images, height, width, channels].
template <class On>
Tensor transposed(const On& on, const Tensor& x) {
  const Tensor y = empty(on, {x.size(0), x.size(2), x.size(3), x.size(1)}, x.scalar_type());
  check(on.transpose_images(element_size(x.scalar_type()), x.const_data_ptr(), x.size(0), x.size(1),
                            x.size(2) * x.size(3), y.mutable_data_ptr()));
  return y;
}

template <class On>
Images parse_images(const On& on, const Tensor& x, int64_t kernel_height, int64_t kernel_width,
                    const ConvArguments& args) {
  if (!on.has(x)) invalid("x: expected " + on.kind());
  const DType dtype = float_dtype("x", x);
  if (x.dim() != 4)
    invalid("x: expected 4 axes (images, channels, height, width), got shape " + to_string(sizes_of(x)));
  check_pair("stride", args.stride);
  check_pair("padding", args.padding);
  check_pair("dilation", args.dilation);
  const bool channels_last = is_channels_last(x);
  Images images{x, dtype, {}, channels_last && !x.is_contiguous()};
  images.shape = {x.size(0),      x.size(1),      x.size(2),       x.size(3),       kernel_height,    kernel_width,
                  args.stride[0], args.stride[1], args.padding[0], args.padding[1], args.dilation[0], args.dilation[1]};
  check(conv2d_output(images.shape, &images.output_height, &images.output_width));
  if (!channels_last) images.x = transposed(on, dense(x));
  return images;
}

// run(y): writes the result of n channels, channels last.
template <class On, class Run>
Tensor convolve(const On& on, const Images& images, int64_t n, Run&& run) {
  const int64_t height = images.output_height;
  const int64_t width = images.output_width;
  const Sizes sizes = {images.shape.images, n, height, width};
  const ScalarType type = images.x.scalar_type();
  const auto filled = [&](const Tensor& y) {
    if (y.numel() > 0) check(run(y.mutable_data_ptr()));
    return y;
  };
  if (images.result_channels_last) return filled(on.empty_strided(sizes, {height * width * n, 1, width * n, n}, type));
  if (n == 1 || height * width == 1) return filled(empty(on, sizes, type));  // the same order in memory
  const Tensor last = filled(empty(on, {images.shape.images, height, width, n}, type));
  const Tensor y = empty(on, sizes, type);
  check(on.transpose_images(element_size(type), last.const_data_ptr(), images.shape.images, height * width, n,
                            y.mutable_data_ptr()));
  return y;
}

}  // namespace kdq::bindings
