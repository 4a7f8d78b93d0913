// The arithmetic of fake-quant on one element, and which scale an element has: include/kdq/fake_quant.h on a GPU. The
// library is compiled with -fmad=false: a fused multiply-add would change bits.
#pragma once

#include <cmath>

#include "core/checks.h"
#include "cuda/elements.h"
#include "kdq/fake_quant.h"

namespace kdq::cuda {

// A channel's grid, in registers.
struct Grid {
  float scale;
  float inverse;
  float zero_point;
  float quant_min;
  float quant_max;

  // The rounded integer before clamping; NaN for NaN.
  KDQ_DEVICE float unclamped(float x) const { return nearbyintf(x * inverse) + zero_point; }
  // NaN passes.
  KDQ_DEVICE float clamp(float q) const { return q < quant_min ? quant_min : q > quant_max ? quant_max : q; }
  KDQ_DEVICE float dequantized(float q) const { return (q - zero_point) * scale; }
};

// A call's grid and layout, in device memory: QuantGrid and QuantShape as a kernel takes them.
struct GridView {
  const float* scale;
  const void* zero_point;
  ZeroPointKind zero_point_kind;
  float quant_min;
  float quant_max;
  int64_t channels;
  int64_t inner;

  template <class Thread>
  KDQ_DEVICE Grid at(Thread& thread, int64_t channel) const {
    const float s = thread.load(scale + channel);
    return {s, 1.0F / s, zero_point_at(thread, channel), quant_min, quant_max};
  }

 private:
  template <class Thread>
  KDQ_DEVICE float zero_point_at(Thread& thread, int64_t channel) const {
    if (zero_point_kind == ZeroPointKind::kNone) return 0.0F;
    if (zero_point_kind == ZeroPointKind::kInt32) {
      return static_cast<float>(thread.load(static_cast<const int32_t*>(zero_point) + channel));
    }
    const float rounded = nearbyintf(thread.load(static_cast<const float*>(zero_point) + channel));
    const float clamped = rounded < quant_min ? quant_min : rounded > quant_max ? quant_max : rounded;
    return clamped + 0.0F;  // -0.0 becomes +0.0
  }
};

// Walks over consecutive elements; a grid is loaded only where the channel changes.
template <class Thread>
class GridCursor {
 public:
  KDQ_DEVICE GridCursor(Thread& thread, const GridView& view, int64_t element) : thread_(thread), view_(view) {
    channel_ = 0;
    left_ = INT64_MAX;
    if (view.channels > 1) {
      const int64_t run = element / view.inner;
      channel_ = run % view.channels;
      left_ = view.inner - (element - run * view.inner);
    }
    grid_ = view.at(thread, channel_);
  }

  // The grid of the next element.
  KDQ_DEVICE const Grid& next() {
    if (left_ == 0) {
      channel_ = channel_ + 1 == view_.channels ? 0 : channel_ + 1;
      left_ = view_.inner;
      grid_ = view_.at(thread_, channel_);
    }
    --left_;
    return grid_;
  }

 private:
  Thread& thread_;
  const GridView& view_;
  int64_t channel_;
  int64_t left_;
  Grid grid_;
};

// ---- for launching -------------------------------------------------------------------------------------------------

// Everything that can be checked without reading device memory.
inline Status check_quant_call(const QuantShape& shape, const QuantGrid& grid, const char* in_name, const void* in,
                               const char* out_name, const void* out) {
  Status status = check_shape(shape);
  if (status.ok()) status = check_range(grid);
  if (status.ok()) status = check_grid_pointers(grid, shape.channels);
  if (!status.ok()) return status;
  const int64_t n = shape.outer * shape.channels * shape.inner;
  status = check_pointer(in_name, in, n);
  if (status.ok()) status = check_pointer(out_name, out, n);
  return status;
}

inline GridView view_of(const QuantShape& shape, const QuantGrid& grid) {
  return {grid.scale,
          grid.zero_point,
          grid.zero_point_kind,
          static_cast<float>(grid.quant_min),
          static_cast<float>(grid.quant_max),
          shape.channels,
          shape.inner};
}

}  // namespace kdq::cuda
