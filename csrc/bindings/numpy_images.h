// Images as NumPy arrays, channels last, and the arguments of a convolution over them.
#pragma once

#include <pybind11/stl.h>

#include <utility>

#include "kdq/conv2d.h"
#include "numpy_common.h"

namespace kdq::bindings {

using Pair = std::pair<int64_t, int64_t>;

struct Images {
  py::array x;  // [images, height, width, channels]
  DType dtype;
  Conv2dShape shape;
  int64_t output_height = 0;
  int64_t output_width = 0;

  py::array result(int64_t n) const { return empty(x.dtype(), {shape.images, output_height, output_width, n}); }
};

inline Images parse_images(const py::array& x, const Pair& kernel, const Pair& stride, const Pair& padding,
                           const Pair& dilation) {
  const DType dtype = float_dtype("x", x);
  if (x.ndim() != 4) invalid("x: expected 4 axes, got " + std::to_string(x.ndim()));
  Images images{dense(x), dtype, {}};
  images.shape = {x.shape(0),   x.shape(3),    x.shape(1),    x.shape(2),     kernel.first,   kernel.second,
                  stride.first, stride.second, padding.first, padding.second, dilation.first, dilation.second};
  check(conv2d_output(images.shape, &images.output_height, &images.output_width));
  return images;
}

}  // namespace kdq::bindings
