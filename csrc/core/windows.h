// The windows of a convolution: where they lie in images that have their padding around them, and copying them.
#pragma once

#include <algorithm>
#include <cstring>

#include "kdq/conv2d.h"

namespace kdq {

// How many images are prepared at a time: as many as take so many bytes, which stay in L3 until their windows are
// gathered.
constexpr int64_t kImagesBytes = int64_t{4} << 20;

// std::memcpy, without its call for the few bytes that a window of few channels has in a line.
inline void copy_bytes(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kChunk = 16;
  constexpr int64_t kMany = 64;
  if (bytes < kChunk || bytes >= kMany) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  for (int64_t i = 0; i < bytes - kChunk; i += kChunk) std::memcpy(to + i, from + i, kChunk);
  std::memcpy(to + bytes - kChunk, from + bytes - kChunk, kChunk);
}

struct Windows {
  Conv2dShape shape;
  int64_t output_height = 0;
  int64_t output_width = 0;
  int64_t pixel_bytes = 0;  // of a prepared image, whose lines lie line_bytes apart
  int64_t line_bytes = 0;

  // spare: bytes that may be written beyond a line's last value.
  Status set(const Conv2dShape& of, int64_t bytes_of_pixel, int64_t spare) {
    shape = of;
    pixel_bytes = bytes_of_pixel;
    line_bytes = ((shape.width + 2 * shape.padding_width) * pixel_bytes + spare + 63) / 64 * 64;
    return conv2d_output(shape, &output_height, &output_width);
  }

  int64_t lines() const { return shape.height + 2 * shape.padding_height; }
  int64_t image_bytes() const { return lines() * line_bytes; }
  int64_t outputs() const { return output_height * output_width; }
  int64_t bytes() const { return shape.kernel_height * shape.kernel_width * pixel_bytes; }  // of a window
  int64_t images_at_once() const {
    return std::clamp<int64_t>(kImagesBytes / std::max<int64_t>(image_bytes(), 1), 1,
                               std::max<int64_t>(shape.images, 1));
  }

  // Line `line` of an image, padding counted, is line `line - padding_height` of x, or none.
  bool is_padding(int64_t line) const {
    return line < shape.padding_height || line >= shape.padding_height + shape.height;
  }

  // One output and the first byte of its window.
  struct At {
    int64_t image;
    int64_t row;
    int64_t column;
    const char* window;
  };

  // body(i, At) for outputs first ... first + count - 1, images counted. One division for all: it takes as long as
  // copying a small window.
  template <class Body>
  void for_each(const char* images, int64_t first, int64_t count, Body&& body) const {
    At at = {first / outputs(), first % outputs() / output_width, first % outputs() % output_width, nullptr};
    for (int64_t i = 0; i < count; ++i) {
      at.window = images + at.image * image_bytes() + at.row * shape.stride_height * line_bytes +
                  at.column * shape.stride_width * pixel_bytes;
      body(i, at);
      if (++at.column < output_width) continue;
      at.column = 0;
      if (++at.row < output_height) continue;
      at.row = 0;
      ++at.image;
    }
  }

  void copy(const char* from, char* to) const {
    const bool together = shape.dilation_width == 1;
    const int64_t pieces = together ? 1 : shape.kernel_width;
    const int64_t piece_bytes = together ? shape.kernel_width * pixel_bytes : pixel_bytes;
    for (int64_t y = 0; y < shape.kernel_height; ++y, from += shape.dilation_height * line_bytes) {
      for (int64_t p = 0; p < pieces; ++p, to += piece_bytes) {
        copy_bytes(to, from + p * shape.dilation_width * pixel_bytes, piece_bytes);
      }
    }
  }
};

}  // namespace kdq
