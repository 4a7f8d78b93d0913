// The windows of a convolution as the rows of a product, on a GPU: a source of rows for TiledProduct.
//
// Images are prepared once, with their padding around them. A window's bytes are then runs of consecutive bytes: a line
// of the kernel where its taps lie side by side, else a pixel. A thread finds the 16 bytes of k that it wants where
// they lie, and no matrix of windows is ever in memory.
#pragma once

#include "core/conv2d_sizes.h"
#include "cuda/tile.h"

namespace kdq::cuda {

// Division of n < 2^31 by the same number again and again, as a multiplication: with l the bits of divisor - 1, the
// multiplier is too large by less than 2^l / divisor, and the quotient by less than n / 2^31 / divisor: less than what
// it lacks to the next.
struct Divisor {
  uint32_t divisor;
  uint32_t multiplier;  // ceil(2^shift / divisor)
  int shift;            // 31 + l

  KDQ_HOST_DEVICE uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{n} * multiplier >> shift);
  }
};

// 1 <= divisor < 2^31
inline Divisor divisor_of(int64_t divisor) {
  int shift = 31;
  while ((int64_t{1} << (shift - 31)) < divisor) ++shift;
  const uint64_t multiplier =
      ((uint64_t{1} << shift) + static_cast<uint64_t>(divisor) - 1) / static_cast<uint64_t>(divisor);
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(multiplier), shift};
}

// Images with their padding, as they lie in the workspace, and which outputs they have.
struct PaddedImages {
  Conv2dShape shape;
  int64_t output_height;
  int64_t output_width;
  int64_t pixel_bytes;
  int64_t line_bytes;  // a multiple of 16
  Divisor by_outputs;  // of an image
  Divisor by_output_width;

  KDQ_HOST_DEVICE int64_t lines() const { return shape.height + 2 * shape.padding_height; }
  KDQ_HOST_DEVICE int64_t image_bytes() const { return lines() * line_bytes; }
  int64_t bytes() const { return shape.images * image_bytes(); }
  int64_t outputs() const { return shape.images * output_height * output_width; }
  int64_t window_bytes() const { return shape.kernel_height * shape.kernel_width * pixel_bytes; }
  bool has_padding() const { return shape.padding_height + shape.padding_width > 0; }

  struct Output {
    uint32_t image;
    uint32_t row;
    uint32_t column;
  };
  // outputs() < 2^31
  KDQ_DEVICE uint32_t image_of(int64_t output) const { return by_outputs.quotient(static_cast<uint32_t>(output)); }
  KDQ_DEVICE Output output_at(int64_t output) const {
    const uint32_t image = image_of(output);
    const uint32_t in_image = static_cast<uint32_t>(output) - image * by_outputs.divisor;
    const uint32_t row = by_output_width.quotient(in_image);
    return {image, row, in_image - row * by_output_width.divisor};
  }

  // A line of the padded images, counted through all of them. row: which of x, all images' lines counted; or -1.
  struct Line {
    int64_t image;
    int64_t row;
  };
  KDQ_DEVICE Line line_at(int64_t line) const {
    const int64_t image = line / lines();
    const int64_t row = line - image * lines() - shape.padding_height;
    return {image, row >= 0 && row < shape.height ? image * shape.height + row : -1};
  }
};

// The windows of padded images. unit: how many bytes lie together whatever the window: 16, 8, 4 or 1.
struct Windows {
  const uint8_t* data;
  int64_t rows;
  int64_t row_bytes;  // of a window
  int unit;
  PaddedImages images;
  Divisor by_run;        // bytes of a run
  Divisor by_runs;       // that lie side by side
  int64_t down_bytes;    // to the run below
  int64_t across_bytes;  // to the run beside
  int64_t row_step;      // from an output's window to that of the output below
  int64_t column_step;   // and beside

  // Where a window begins; nullptr past the last.
  using Row = const uint8_t*;
  KDQ_DEVICE Row row_at(int64_t row) const {
    if (row >= rows) return nullptr;
    const PaddedImages::Output at = images.output_at(row);
    return data + at.image * images.image_bytes() + at.row * row_step + at.column * column_step;
  }

  // 16 bytes of a window, which row_at() gave, from `byte` on; what lies outside is 0, and all of it where byte is not
  // below end.
  template <class Thread>
  KDQ_DEVICE Words<16> piece(Thread& thread, Row row, int64_t byte, int64_t end) const {
    Words<16> words = {};
    if (row == nullptr || byte >= end) return words;
    const auto first = static_cast<uint32_t>(byte);
    if (unit == 16) return thread.load(reinterpret_cast<const Words<16>*>(row + offset(first)));
    if (unit == 8) {
      gather<8>(thread, row, first, &words);
    } else if (unit == 4) {
      gather<4>(thread, row, first, &words);
    } else {
      for (uint32_t i = 0; i < 16; ++i) {
        if (first + i >= row_bytes) break;
        words.word[i / 4] |= static_cast<uint32_t>(thread.load(row + offset(first + i))) << (8 * (i % 4));
      }
    }
    return words;
  }

 private:
  // Of a window's byte, from where the window begins.
  KDQ_DEVICE int64_t offset(uint32_t byte) const {
    const uint32_t run = by_run.quotient(byte);
    const uint32_t down = by_runs.quotient(run);
    return down * down_bytes + (run - down * by_runs.divisor) * across_bytes + (byte - run * by_run.divisor);
  }

  template <int kBytes, class Thread>
  KDQ_DEVICE void gather(Thread& thread, const uint8_t* row, uint32_t first, Words<16>* words) const {
#pragma unroll
    for (int i = 0; i < 16 / kBytes; ++i) {
      const uint32_t byte = first + static_cast<uint32_t>(kBytes * i);
      if (byte >= row_bytes) continue;
      const Words<kBytes> part = thread.load(reinterpret_cast<const Words<kBytes>*>(row + offset(byte)));
      memcpy(words->word + kBytes / 4 * i, part.word, kBytes);
    }
  }
};

// ---- for launching -------------------------------------------------------------------------------------------------

// pixel_bytes: of a prepared image.
inline Status pad_images(const Conv2dShape& shape, int64_t pixel_bytes, PaddedImages* images) {
  *images = {shape, 0, 0, pixel_bytes, 0, {}, {}};
  const Status status = conv2d_sizes(shape, &images->output_height, &images->output_width);
  if (!status.ok()) return status;
  images->line_bytes = ceil_div((shape.width + 2 * shape.padding_width) * pixel_bytes, 16) * 16;
  if (images->outputs() > INT32_MAX || images->output_height * images->output_width > INT32_MAX) {
    return Status::invalid("x: expected less than 2^31 outputs of a channel");
  }
  if (images->line_bytes > INT32_MAX) return Status::invalid("x: expected lines of less than 2^31 bytes");
  if (images->window_bytes() > INT32_MAX)
    return Status::invalid("kernel_size: expected windows of less than 2^31 bytes");
  images->by_outputs = divisor_of(images->output_height * images->output_width);
  images->by_output_width = divisor_of(images->output_width);
  return {};
}

// data: the padded images, a multiple of 16.
inline Windows windows_of(const PaddedImages& images, const void* data) {
  const Conv2dShape& s = images.shape;
  const bool together = s.dilation_width == 1;
  const int64_t pixel = images.pixel_bytes;
  return {static_cast<const uint8_t*>(data),
          images.outputs(),
          images.window_bytes(),
          pixel % 16 == 0  ? 16
          : pixel % 8 == 0 ? 8
          : pixel % 4 == 0 ? 4
                           : 1,
          images,
          divisor_of(together ? s.kernel_width * pixel : pixel),
          divisor_of(together ? 1 : s.kernel_width),
          s.dilation_height * images.line_bytes,
          s.dilation_width * pixel,
          s.stride_height * images.line_bytes,
          s.stride_width * pixel};
}

}  // namespace kdq::cuda
