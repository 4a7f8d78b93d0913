// The sizes of a convolution, checked: what a call on a GPU needs too.
#pragma once

#include <algorithm>
#include <string>

#include "kdq/conv2d.h"

namespace kdq {

// So large a side, or image, that products of them still fit 64 bits.
constexpr int64_t kMostSide = int64_t{1} << 24;
constexpr int64_t kMostBytes = int64_t{1} << 42;

struct Conv2dSide {
  const char* name;
  int64_t size;
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
};

inline Status check_side_number(const char* what, const char* side, int64_t value, int64_t least) {
  if (value >= least && value <= kMostSide) return {};
  return Status::invalid(std::string(what) + ": expected " + std::to_string(least) + " to " +
                         std::to_string(kMostSide) + " for the " + side + ", got " + std::to_string(value));
}

inline Status conv2d_output_side(const Conv2dSide& s, int64_t* output) {
  Status status = check_side_number("x", s.name, s.size, 0);
  if (status.ok()) status = check_side_number("kernel_size", s.name, s.kernel, 1);
  if (status.ok()) status = check_side_number("stride", s.name, s.stride, 1);
  if (status.ok()) status = check_side_number("padding", s.name, s.padding, 0);
  if (status.ok()) status = check_side_number("dilation", s.name, s.dilation, 1);
  if (!status.ok()) return status;
  const int64_t covered = s.dilation * (s.kernel - 1) + 1;
  const int64_t padded = s.size + 2 * s.padding;
  if (padded < covered) {
    return Status::invalid("x: " + std::string(s.name) + " " + std::to_string(s.size) + " and its padding make " +
                           std::to_string(padded) + ", less than the " + std::to_string(covered) +
                           " that the kernel covers");
  }
  *output = (padded - covered) / s.stride + 1;
  return {};
}

// As conv2d_output().
inline Status conv2d_sizes(const Conv2dShape& s, int64_t* height, int64_t* width) {
  if (s.images < 0 || s.images > kMostSide) {
    return Status::invalid("x: expected 0 to " + std::to_string(kMostSide) + " images, got " +
                           std::to_string(s.images));
  }
  Status status = check_side_number("x", "channels", s.channels, 1);
  if (status.ok()) {
    status = conv2d_output_side(
        {"height", s.height, s.kernel_height, s.stride_height, s.padding_height, s.dilation_height}, height);
  }
  if (status.ok()) {
    status = conv2d_output_side({"width", s.width, s.kernel_width, s.stride_width, s.padding_width, s.dilation_width},
                                width);
  }
  if (!status.ok()) return status;
  int64_t bytes = 0;
  const bool fits =
      !__builtin_mul_overflow((s.height + 2 * s.padding_height) * s.channels, s.width + 2 * s.padding_width, &bytes) &&
      !__builtin_mul_overflow(bytes, 4 * std::max<int64_t>(s.images, 1), &bytes) && bytes <= kMostBytes;
  if (!fits) return Status::invalid("x: the images with their padding are too large");
  return {};
}

}  // namespace kdq
