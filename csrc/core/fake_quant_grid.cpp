// Validation of fake-quant arguments, and the choice between uniform runs and per-element scales.
#include "core/fake_quant_grid.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "core/checks.h"
#include "core/format.h"
#include "core/kernel_choice.h"

namespace kdq {
namespace {

constexpr KernelChoice<FakeQuantKernels> kChoices[] = {
    {Isa::kReference, CpuExtra::kNone, &kFakeQuantReference},
#if defined(KDQ_HAVE_X86)
    {Isa::kAvx2, CpuExtra::kNone, &kFakeQuantAvx2},
    {Isa::kAvx512, CpuExtra::kNone, &kFakeQuantAvx512},
#endif
};

// Runs shorter than this cost more in calls than in work, so their scales are written out one an element instead.
constexpr int64_t kShortestRun = 16;

// Results from here on do not fit a last-level cache beside what they are computed from.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

std::string at_index(int64_t i) { return " at index " + std::to_string(i); }

Status read_scale(const QuantGrid& grid, int64_t channels, PreparedGrid* out) {
  out->scale.assign(grid.scale, grid.scale + channels);
  out->inverse.resize(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) {
    const float scale = grid.scale[c];
    const float inverse = 1.0F / scale;
    if (!(scale > 0.0F) || !std::isfinite(scale) || !std::isfinite(inverse)) {
      return Status::invalid("scale: expected positive and finite, with a finite reciprocal, got " + format(scale) +
                             at_index(c));
    }
    out->inverse[static_cast<size_t>(c)] = inverse;
  }
  return {};
}

Status read_zero_point(const QuantGrid& grid, int64_t channels, PreparedGrid* out) {
  out->zero_point.assign(static_cast<size_t>(channels), 0.0F);
  if (grid.zero_point_kind == ZeroPointKind::kNone || channels == 0) return {};
  const float low = static_cast<float>(grid.quant_min);
  const float high = static_cast<float>(grid.quant_max);
  for (int64_t c = 0; c < channels; ++c) {
    if (grid.zero_point_kind == ZeroPointKind::kInt32) {
      const int32_t value = static_cast<const int32_t*>(grid.zero_point)[c];
      if (value < grid.quant_min || value > grid.quant_max) {
        return Status::invalid("zero_point: expected an integer in [" + std::to_string(grid.quant_min) + ", " +
                               std::to_string(grid.quant_max) + "], got " + std::to_string(value) + at_index(c));
      }
      out->zero_point[static_cast<size_t>(c)] = static_cast<float>(value);
    } else {
      const float value = static_cast<const float*>(grid.zero_point)[c];
      if (std::isnan(value)) return Status::invalid("zero_point: expected a number, got NaN" + at_index(c));
      // + 0.0 so that a zero point of -0.3 does not become -0.0.
      out->zero_point[static_cast<size_t>(c)] = std::min(std::max(std::nearbyint(value), low), high) + 0.0F;
    }
  }
  return {};
}

void repeat_each(std::vector<float>* values, int64_t times) {
  std::vector<float> repeated;
  repeated.reserve(values->size() * static_cast<size_t>(times));
  for (float value : *values) repeated.insert(repeated.end(), static_cast<size_t>(times), value);
  *values = std::move(repeated);
}

}  // namespace

Status fake_quant_kernels(const FakeQuantKernels** kernels) { return choose_kernels(kChoices, kernels); }

bool worth_streaming(const RunLayout& layout, const void* in, const void* out, size_t element_size) {
  const int64_t row_bytes = layout.row_length * static_cast<int64_t>(element_size);
  const bool aligned = reinterpret_cast<uintptr_t>(out) % kStreamAlignment == 0 &&
                       (layout.rows == 1 || row_bytes % kStreamAlignment == 0);
  return aligned && in != out && layout.rows * row_bytes >= kStreamBytes;
}

Status prepare_grid(const QuantShape& shape, const QuantGrid& grid, PreparedGrid* out) {
  Status status = check_shape(shape);
  if (status.ok()) status = check_range(grid);
  if (status.ok()) status = check_grid_pointers(grid, shape.channels);
  if (status.ok()) status = read_scale(grid, shape.channels, out);
  if (status.ok()) status = read_zero_point(grid, shape.channels, out);
  if (!status.ok()) return status;
  out->quant_min = static_cast<float>(grid.quant_min);
  out->quant_max = static_cast<float>(grid.quant_max);
  if (shape.channels == 1) {
    out->layout = {kUniform, shape.outer, shape.inner, 1, 1};
  } else if (shape.inner >= kShortestRun) {
    out->layout = {kUniform, shape.outer * shape.channels, shape.inner, shape.channels, 1};
  } else {
    const int64_t entries = shape.channels * shape.inner;
    if (shape.inner > 1) {
      repeat_each(&out->scale, shape.inner);
      repeat_each(&out->inverse, shape.inner);
      repeat_each(&out->zero_point, shape.inner);
    }
    out->layout = {kEach, shape.outer, entries, entries, shape.inner};
  }
  return status;
}

}  // namespace kdq
