// int8_conv2d on a GPU: images are quantized once, with their padding, and their windows are the rows of the tiled int8
// product. Small and Hopper's products stay with the linear layers: convolutions have many rows.
#pragma once

#include "cuda/int8_gemm.h"
#include "cuda/quantize_images.h"

namespace kdq::cuda {

// Exact sums to floats, where the rows of an image share a scale.
struct ImageScaledOutput {
  static constexpr bool kBits = false;
  ScaledOutput to;  // row_scale: of each image
  PaddedImages images;

  template <class Thread>
  KDQ_DEVICE void store(Thread& thread, int64_t row, int64_t col, int32_t sum) const {
    to.to.store(thread, row, col, static_cast<float>(sum), this->row(thread, row));
  }
  template <class Thread>
  KDQ_DEVICE float row(Thread& thread, int64_t row) const {
    return to.row(thread, images.image_of(row));
  }
  template <class Thread>
  KDQ_DEVICE LinearOutput::Column column(Thread& thread, int64_t col) const {
    return to.column(thread, col);
  }
  template <class Thread>
  KDQ_DEVICE float value(Thread& thread, float scale, const LinearOutput::Column& column, int32_t sum) const {
    return to.value(thread, scale, column, sum);
  }
  template <class Body>
  KDQ_DEVICE void with_elements(const Body& body) const {
    to.with_elements(body);
  }
};

// ---- for launching -------------------------------------------------------------------------------------------------

// The workspace of a call: scales of images, magnitudes of lines, padded images, results of pieces of k; each a
// multiple of 16.
struct Int8ConvPlan {
  PaddedImages images;
  int64_t splits;
  size_t largest_at;
  size_t images_at;
  size_t partial_at;
  size_t bytes;
};

inline Status plan_int8_conv2d(const Conv2dShape& shape, int64_t n, Int8ConvPlan* plan) {
  const auto rounded = [](int64_t bytes) { return static_cast<size_t>(ceil_div(bytes, 16) * 16); };
  *plan = {};
  const Status status = pad_images(shape, shape.channels, &plan->images);
  if (!status.ok()) return status;
  const int64_t m = plan->images.outputs();
  plan->splits = splits_of_tiles(m, n, plan->images.window_bytes());
  plan->largest_at = rounded(4 * shape.images);
  plan->images_at = plan->largest_at + rounded(4 * shape.images * shape.height);
  plan->partial_at = plan->images_at + rounded(plan->images.bytes());
  plan->bytes = plan->partial_at + rounded(static_cast<int64_t>(bytes_of_pieces(m, n, plan->splits)));
  return {};
}

inline Status check_int8_conv2d(const Int8Conv2d& args, const PaddedImages& images) {
  const Conv2dShape& s = args.shape;
  const Int8Linear& layer = args.layer;
  if (layer.n < 0) return Status::invalid("n: expected at least 0, got " + std::to_string(layer.n));
  if (images.window_bytes() > kInt8StaticMaxK) {
    return Status::invalid("x: K = " + std::to_string(images.window_bytes()) +
                           " would overflow int32 sums; expected at most " + std::to_string(kInt8StaticMaxK));
  }
  Status status = check_input_grid(layer);
  if (status.ok()) status = check_pointer("x", layer.x, s.images * s.height * s.width * s.channels);
  if (status.ok()) status = check_pointer("weight", layer.weight, layer.n * images.window_bytes());
  if (status.ok()) status = check_pointer("weight_scale", layer.weight_scale, layer.n);
  if (status.ok()) status = check_pointer("y", layer.y, images.outputs() * layer.n);
  if (status.ok()) status = check_pointer("workspace", layer.workspace, images.outputs() * layer.n);
  return status;
}

template <class Launcher>
Status launch_int8_conv2d(const Launcher& launcher, const Int8Conv2d& args) {
  const Int8Linear& layer = args.layer;
  Int8ConvPlan plan;
  Status status = plan_int8_conv2d(args.shape, layer.n, &plan);
  if (status.ok()) status = check_int8_conv2d(args, plan.images);
  if (!status.ok() || plan.images.outputs() * layer.n == 0) return status;
  char* workspace = static_cast<char*>(layer.workspace);
  const QuantizedImages to = {reinterpret_cast<int8_t*>(workspace + plan.images_at),
                              reinterpret_cast<float*>(workspace),
                              reinterpret_cast<uint32_t*>(workspace + plan.largest_at)};
  const StaticGrid grid = input_grid(layer);
  status = launch_quantize_images(launcher, layer.dtype, layer.x, plan.images, layer.is_static ? &grid : nullptr, to);
  if (!status.ok()) return status;
  const Windows windows = windows_of(plan.images, to.q);
  const Operand weight = operand_of(layer.weight, layer.n, windows.row_bytes);
  const ImageScaledOutput output = {{linear_output(layer), to.scale}, plan.images};
  int32_t* partial = reinterpret_cast<int32_t*>(workspace + plan.partial_at);
  return layer.is_static
             ? launch_tiled(launcher, StaticInt8Product{grid}, windows, weight, output, plan.splits, partial)
             : launch_tiled(launcher, Int8Product(), windows, weight, output, plan.splits, partial);
}

}  // namespace kdq::cuda
