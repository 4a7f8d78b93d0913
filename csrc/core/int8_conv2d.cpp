// int8_conv2d: images are quantized once, with their padding, and their windows are the rows of an int8 product.
#include <cfloat>
#include <cmath>
#include <cstring>

#include "core/checks.h"
#include "core/int8_call.h"
#include "core/scratch.h"
#include "core/windows.h"

namespace kdq {
namespace {

// The grid on which an image is quantized. Dynamic ones are static ones as well: with a zero point in the middle.
constexpr int32_t kMiddle = 128;

// Some images of a call, quantized: their padded lines, and a scale for each.
struct Images {
  const Int8Conv2d& args;
  const Int8Kernels& kernels;
  const Windows& windows;
  char* data;          // [count][windows.lines()][windows.line_bytes]
  float* line_scales;  // [count][windows.lines()]; of padding 0
  float* scales;       // [count]

  static int64_t bytes(const Windows& w, int64_t count) {
    return count * (w.image_bytes() + (w.lines() + 1) * static_cast<int64_t>(sizeof(float)));
  }

  const char* line_of_x(int64_t image, int64_t line) const {
    const Conv2dShape& s = args.shape;
    const int64_t line_values = s.width * s.channels;
    const int64_t at = (image * s.height + line - s.padding_height) * line_values;
    return static_cast<const char*>(args.layer.x) + at * static_cast<int64_t>(dtype_size(args.layer.dtype));
  }

  // body(image, line) for every line of `count` images.
  template <class Body>
  void for_each_line(int64_t count, const ParallelFor& parallel_for, Body&& body) const {
    constexpr int64_t kValuesWorthAThread = 1 << 15;
    const int64_t grain = kValuesWorthAThread / (args.shape.width * args.shape.channels + 1) + 1;
    parallel_range(parallel_for, count * windows.lines(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / windows.lines(), i % windows.lines());
    });
  }

  // Images first ... first + count - 1 of x.
  void quantize(int64_t first, int64_t count, const ParallelFor& parallel_for) const {
    const int dtype = static_cast<int>(args.layer.dtype);
    if (!args.layer.is_static) {
      for_each_line(count, parallel_for, [&](int64_t image, int64_t line) {
        float* scale = line_scales + image * windows.lines() + line;
        *scale = 0.0F;
        if (windows.is_padding(line)) return;
        kernels.row_scales[dtype](line_of_x(first + image, line), 1, args.shape.width * args.shape.channels, scale);
      });
    }
    for (int64_t i = 0; i < count; ++i) scales[i] = args.layer.is_static ? args.layer.input_scale : largest(i);
    for_each_line(count, parallel_for, [&](int64_t image, int64_t line) { quantize_line(first, image, line); });
    for (int64_t i = 0; i < count; ++i) {
      if (!(largest(i) <= FLT_MAX)) scales[i] = NAN;
    }
  }

  // Of an image's lines; NaN if one is.
  float largest(int64_t image) const {
    float scale = 0.0F;
    for (int64_t line = 0; line < windows.lines(); ++line) {
      const float other = line_scales[image * windows.lines() + line];
      if (!(other <= scale)) scale = other;
      if (std::isnan(scale)) break;
    }
    return scale;
  }

  void quantize_line(int64_t first, int64_t image, int64_t line) const {
    const Int8Linear& layer = args.layer;
    const int32_t zero_point = layer.is_static ? layer.input_zero_point : kMiddle;
    const int64_t side = args.shape.padding_width * windows.pixel_bytes;
    const int64_t inner = args.shape.width * windows.pixel_bytes;
    char* to = data + image * windows.image_bytes() + line * windows.line_bytes;
    float* scale = line_scales + image * windows.lines() + line;
    if (windows.is_padding(line)) {
      *scale = 0.0F;
      return fill(to, side + inner + side, zero_point);
    }
    const bool usable = scales[image] <= FLT_MAX;
    const StaticGrid grid = {usable ? 1.0F / scales[image] : 0.0F, zero_point,
                             layer.is_static ? layer.input_quant_max : 255};
    const Int8RowsCall row = {
        line_of_x(first + image, line), args.shape.width * args.shape.channels, 1, to + side, 0, scale};
    kernels.prepare_static[static_cast<int>(layer.dtype)](row, grid, scales[image]);
    fill(to, side, zero_point);
    fill(to + side + inner, side, zero_point);
  }

  void fill(char* to, int64_t bytes, int32_t value) const {
    if (kernels.size.element_bytes == 1) {
      std::memset(to, value, static_cast<size_t>(bytes));
    } else {
      std::fill_n(reinterpret_cast<int16_t*>(to), bytes / 2, static_cast<int16_t>(value));
    }
  }
};

Status check(const Int8Conv2d& args, const Windows& windows, const PackedWeight& weight) {
  const Conv2dShape& s = args.shape;
  const Int8Linear& layer = args.layer;
  Status status = check_k("x", s.kernel_height * s.kernel_width * s.channels, weight.k, kInt8StaticMaxK);
  if (status.ok() && layer.is_static) {
    status = check_static_grid(&layer.input_scale, &layer.input_zero_point, layer.input_quant_max);
  }
  if (status.ok()) status = check_pointer("x", layer.x, s.images);
  if (status.ok()) status = check_pointer("y", layer.y, s.images * windows.outputs() * weight.n);
  if (status.ok()) status = check_pointer("weight_scale", layer.weight_scale, weight.n);
  return status.ok() ? check_weight_scale(layer.weight_scale, weight.n) : status;
}

}  // namespace

Status int8_conv2d(const Int8Conv2d& args, const ParallelFor& parallel_for) {
  Int8Call call;
  Windows windows;
  Status status = call.open(args.layer.packed, args.layer.packed_bytes);
  if (!status.ok()) return status;
  const Int8Kernels& kernels = *call.kernels;
  const int64_t element_bytes = kernels.size.element_bytes;
  status = windows.set(args.shape, args.shape.channels * element_bytes, kernels.size.ku * element_bytes);
  if (status.ok()) status = check(args, windows, call.weight);
  if (!status.ok()) return status;
  call.set_layer(args.layer);
  call.epilogue.offset = args.layer.is_static ? args.layer.input_zero_point : kMiddle;

  const int64_t at_once = windows.images_at_once();
  Scratch scratch(static_cast<size_t>(Images::bytes(windows, at_once)));
  if (scratch.data() == nullptr) return Status::internal("out of memory for quantized images");
  float* scales = reinterpret_cast<float*>(scratch.data() + at_once * windows.image_bytes());
  const Images images = {args, kernels, windows, scratch.data(), scales + at_once, scales};
  const int64_t rest = call.weight.units * kernels.size.ku * element_bytes - windows.bytes();
  for (int64_t first = 0; status.ok() && first < args.shape.images; first += at_once) {
    const int64_t count = std::min(at_once, args.shape.images - first);
    images.quantize(first, count, parallel_for);
    call.m = count * windows.outputs();
    call.y = static_cast<char*>(args.layer.y) + first * windows.outputs() * call.weight.n * result_bytes(call.result);
    status = run_int8(call, call.tile_rows(), element_bytes, panels_at_once, kernels.tiles, parallel_for,
                      [&](int64_t row, int rows, const PreparedRows& to) {
                        windows.for_each(images.data, row, rows, [&](int64_t r, const Windows::At& at) {
                          char* prepared = to.rows + r * to.stride;
                          windows.copy(at.window, prepared);
                          std::memset(prepared + windows.bytes(), 0, static_cast<size_t>(rest));
                          to.scales[r] = images.scales[at.image];
                        });
                      });
  }
  return status;
}

}  // namespace kdq
