// binary_conv2d on a GPU: the signs of images are packed once, with their padding, and their windows are the rows of
// the tiled binary product.
//
// In bits padding is +1, as there is no 0. What it adds to a dot is the sum of the weights that lie on padding, which
// is subtracted again. That sum is the same for all windows with the same part outside: at most 9 classes of them for a
// 3x3 kernel with padding 1. A kernel finds their sums first, for each column.
#pragma once

#include "cuda/binary_gemm.h"
#include "cuda/quantize_rows.h"
#include "cuda/windows.h"

namespace kdq::cuda {

// Lines of x to lines of signs, a pixel's words side by side. A warp or a block a line, a thread a byte.
template <class T, int kTeam>
struct PackLines {
  static constexpr int kThreads = 256;
  static constexpr int kRows = kThreads / kTeam;  // of a block
  struct Shared {};

  const T* x;
  uint8_t* bits;
  PaddedImages images;
  Divisor by_pixel;  // bytes of a pixel's words
  bool wide;         // pixels of x are multiples of 16

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t row = thread.block() * kRows + thread.index() / kTeam;
    if (row >= images.shape.images * images.lines()) return;
    const PaddedImages::Line line = images.line_at(row);
    for (int64_t i = thread.index() % kTeam; i < images.line_bytes; i += kTeam) {
      thread.store(bits + row * images.line_bytes + i, byte_at(thread, line.row, static_cast<uint32_t>(i)));
    }
  }

 private:
  template <class Thread>
  KDQ_DEVICE uint8_t byte_at(Thread& thread, int64_t row, uint32_t byte) const {
    const Conv2dShape& s = images.shape;
    const uint32_t padded = by_pixel.quotient(byte);
    const int64_t pixel = padded - s.padding_width;
    if (row < 0 || pixel < 0 || pixel >= s.width) return 0;
    const int64_t channel = int64_t{byte - padded * by_pixel.divisor} * kByte;
    return sign_byte(thread, x + (row * s.width + pixel) * s.channels + channel, wide, s.channels - channel);
  }
};

// The outputs along one side of an image, by what of their windows lies on padding: each before `inner`, where windows
// begin before the image, and each from `outer` on, where they end behind it, is a class; those between are one.
struct Edges {
  int64_t inner;
  int64_t outer;
  int64_t classes;

  KDQ_DEVICE int64_t class_of(int64_t output) const {
    return output < inner ? output : output < outer ? inner : output - outer + inner + 1;
  }
  // An output of a class that is not the middle one.
  KDQ_DEVICE int64_t output_of(int64_t index) const { return index < inner ? index : index - inner - 1 + outer; }
};

// One side of a convolution.
struct Side {
  int64_t size;  // of an image
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
  Edges edges;

  // Which of the kernel's taps lie inside of the image, for a class of outputs: those from `first` on, before `end`.
  struct Taps {
    int64_t first;
    int64_t end;
  };
  KDQ_DEVICE Taps inside(int64_t index) const {
    if (index == edges.inner) return {0, kernel};
    const int64_t start = edges.output_of(index) * stride - padding;
    return {taps_before(-start), taps_before(size - start)};
  }

 private:
  // How many begin in the first so many places of a window.
  KDQ_DEVICE int64_t taps_before(int64_t places) const {
    const int64_t taps = places <= 0 ? 0 : (places + dilation - 1) / dilation;
    return taps < kernel ? taps : kernel;
  }
};

// sums [classes down, classes across, n]: of each class of windows and each column, the sum of the weights' signs that
// lie on padding. A warp a sum.
struct PaddingSums {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarp;
  struct Shared {};

  const uint32_t* weight;  // [n, down.kernel, across.kernel, words]
  int32_t* sums;
  int64_t n;
  int64_t channels;
  int64_t words;
  Side down;
  Side across;

  int64_t count() const { return down.edges.classes * across.edges.classes * n; }
  int64_t blocks() const { return ceil_div(count(), kWarps); }

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t own = thread.block() * kWarps + thread.index() / kWarp;
    const int64_t index = own / n;
    if (index >= down.edges.classes * across.edges.classes) return;
    const uint32_t* line = weight + (own - index * n) * down.kernel * across.kernel * words;
    const Side::Taps rows = down.inside(index / across.edges.classes);
    const Side::Taps columns = across.inside(index % across.edges.classes);
    uint32_t negative = 0;
    for (int64_t y = 0; y < down.kernel; ++y, line += across.kernel * words) {
      const bool is_inside = y >= rows.first && y < rows.end;
      negative += count_taps(thread, line, 0, is_inside ? columns.first : across.kernel);
      if (is_inside) negative += count_taps(thread, line, columns.end, across.kernel);
    }
    negative = reduce_warp(thread, negative, Sum());
    const int64_t taps = down.kernel * across.kernel - (rows.end - rows.first) * (columns.end - columns.first);
    const int32_t sum = dot_of(static_cast<uint32_t>(taps * channels), static_cast<int32_t>(negative));
    if (thread.index() % kWarp == 0) thread.store(sums + own, sum);
  }

 private:
  // This lane's part of the bits of taps first ... end - 1.
  template <class Thread>
  KDQ_DEVICE uint32_t count_taps(Thread& thread, const uint32_t* line, int64_t first, int64_t end) const {
    uint32_t count = 0;
    for (int64_t i = first * words + thread.index() % kWarp; i < end * words; i += kWarp) {
      count += static_cast<uint32_t>(thread.popcount(thread.load(line + i)));
    }
    return count;
  }
};

// As ScaledDotOutput, less what padding has added.
struct PaddedDotOutput {
  static constexpr bool kBits = false;
  ScaledDotOutput to;
  PaddedImages images;
  Edges down;
  Edges across;
  const int32_t* sums;  // of PaddingSums

  struct Column {
    ScaledDotOutput::Column to;
    int64_t col;
  };

  // The sums of a row's class; nullptr where nothing is on padding.
  template <class Thread>
  KDQ_DEVICE const int32_t* row(Thread&, int64_t row) const {
    const PaddedImages::Output at = images.output_at(row);
    const int64_t y = down.class_of(at.row);
    const int64_t x = across.class_of(at.column);
    return y == down.inner && x == across.inner ? nullptr : sums + (y * across.classes + x) * to.cols;
  }
  template <class Thread>
  KDQ_DEVICE Column column(Thread& thread, int64_t col) const {
    return {to.column(thread, col), col};
  }
  template <class Thread>
  KDQ_DEVICE float value(Thread& thread, const int32_t* row, const Column& column, int32_t different) const {
    int32_t dot = dot_of(to.k, different);
    if (row != nullptr && column.col < to.cols) dot -= thread.load(row + column.col);
    return ScaledDotOutput::scaled(column.to, dot);
  }
  template <class Body>
  KDQ_DEVICE void with_elements(const Body& body) const {
    to.with_elements(body);
  }
};

// ---- for launching -------------------------------------------------------------------------------------------------

inline Edges edges_of(const Side& side, int64_t outputs) {
  const auto between = [](int64_t low, int64_t value, int64_t high) {
    return value < low ? low : value > high ? high : value;
  };
  const int64_t starts = side.size + side.padding - side.dilation * (side.kernel - 1);  // where windows end inside
  const int64_t inner = between(0, ceil_div(side.padding, side.stride), outputs);
  const int64_t outer = between(inner, starts <= 0 ? 0 : ceil_div(starts, side.stride), outputs);
  return {inner, outer, inner + 1 + outputs - outer};
}

// The workspace of a call: sums of what lies on padding, then padded images of signs.
struct BinaryConvPlan {
  PaddedImages images;
  PaddingSums padding;
  size_t images_at;
  size_t bytes;
};

inline Status plan_binary_conv2d(const BinaryConv2d& args, BinaryConvPlan* plan) {
  const Conv2dShape& s = args.shape;
  const int64_t words = binary_words(s.channels);
  *plan = {};
  PaddedImages& images = plan->images;
  Status status = pad_images(s, words * static_cast<int64_t>(sizeof(uint64_t)), &images);
  if (!status.ok()) return status;
  status = check_binary_sizes(images.outputs(), args.layer.n, s.kernel_height * s.kernel_width * s.channels);
  if (!status.ok()) return status;
  Side down = {s.height, s.kernel_height, s.stride_height, s.padding_height, s.dilation_height, {}};
  Side across = {s.width, s.kernel_width, s.stride_width, s.padding_width, s.dilation_width, {}};
  down.edges = edges_of(down, images.output_height);
  across.edges = edges_of(across, images.output_width);
  plan->padding = {reinterpret_cast<const uint32_t*>(args.layer.weight_bits),
                   nullptr,
                   args.layer.n,
                   s.channels,
                   2 * words,
                   down,
                   across};
  plan->images_at = images.has_padding() ? static_cast<size_t>(ceil_div(4 * plan->padding.count(), 16) * 16) : 0;
  plan->bytes = plan->images_at + static_cast<size_t>(images.bytes());
  return {};
}

inline Status check_binary_conv2d(const BinaryConv2d& args, const BinaryConvPlan& plan, const void* workspace) {
  const Conv2dShape& s = args.shape;
  const BinaryLinear& layer = args.layer;
  const int64_t results = plan.images.outputs() * layer.n;
  Status status = check_pointer("weight_bits", layer.weight_bits, layer.n);
  if (status.ok()) status = check_pointer("x", layer.x, s.images * s.height * s.width);
  if (status.ok()) status = check_pointer("y", layer.y, results);
  if (status.ok()) status = check_pointer("weight_scale", layer.weight_scale, layer.n);
  return status.ok() ? check_pointer("workspace", workspace, results) : status;
}

// bits: plan.images.bytes().
template <class Launcher>
Status launch_pack_images(const Launcher& launcher, const BinaryConv2d& args, const PaddedImages& images, void* bits) {
  const Conv2dShape& s = args.shape;
  return for_dtype(args.layer.dtype, [&](auto element) {
    using T = decltype(element);
    return with_row_team(images.line_bytes, [&](auto team) {
      const bool wide = is_aligned(args.layer.x, 16) && s.channels % kChunk<T> == 0;
      const PackLines<T, team.value> kernel = {static_cast<const T*>(args.layer.x), static_cast<uint8_t*>(bits), images,
                                               divisor_of(images.pixel_bytes), wide};
      return launcher.run(kernel, ceil_div(s.images * images.lines(), kernel.kRows));
    });
  });
}

template <class Launcher>
Status launch_binary_conv2d(const Launcher& launcher, const BinaryConv2d& args, void* workspace) {
  const Conv2dShape& s = args.shape;
  const BinaryLinear& layer = args.layer;
  BinaryConvPlan plan;
  Status status = plan_binary_conv2d(args, &plan);
  if (status.ok()) status = check_binary_conv2d(args, plan, workspace);
  if (!status.ok() || plan.images.outputs() * layer.n == 0) return status;
  char* images = static_cast<char*>(workspace) + plan.images_at;
  status = launch_pack_images(launcher, args, plan.images, images);
  plan.padding.sums = static_cast<int32_t*>(workspace);
  if (status.ok() && plan.images.has_padding()) status = launcher.run(plan.padding, plan.padding.blocks());
  if (!status.ok()) return status;
  const Windows windows = windows_of(plan.images, images);
  const auto k = static_cast<uint32_t>(s.kernel_height * s.kernel_width * s.channels);
  const PaddedDotOutput output = {{layer.y, layer.dtype, layer.n, k, layer.weight_scale, layer.bias},
                                  plan.images,
                                  plan.padding.down.edges,
                                  plan.padding.across.edges,
                                  plan.padding.sums};
  return launch_tiled(launcher, BinaryProduct(), windows, operand_of(layer.weight_bits, layer.n, windows.row_bytes),
                      output);
}

}  // namespace kdq::cuda
