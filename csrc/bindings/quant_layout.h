// Which scale belongs to which element: maps the array-level arguments of a quantization op (the sizes of x and scale,
// axis, group_size) to the core's QuantShape. Shared by the NumPy and the torch binding, so that both mean the same.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kdq/fake_quant.h"

namespace kdq::bindings {

using Sizes = std::vector<int64_t>;

inline std::string to_string(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return text + "]";
}

inline int64_t product(const Sizes& sizes, size_t begin, size_t end) {
  int64_t n = 1;
  for (size_t i = begin; i < end; ++i) n *= sizes[i];
  return n;
}

// Per group: scale is [..., K / group_size], one scale for each run of group_size elements of x [..., K].
inline Status group_shape(const Sizes& x, const Sizes& scale, int64_t group_size, QuantShape* shape) {
  if (x.empty()) return Status::invalid("group_size: a 0-d x has no last axis to group");
  if (group_size < 1) return Status::invalid("group_size: expected at least 1, got " + std::to_string(group_size));
  if (x.back() % group_size != 0) {
    return Status::invalid("group_size: the last axis of x has " + std::to_string(x.back()) +
                           " elements, which is not a multiple of group_size " + std::to_string(group_size));
  }
  Sizes expected = x;
  expected.back() /= group_size;
  if (scale != expected) {
    return Status::invalid("scale: expected shape " + to_string(expected) + " for group_size " +
                           std::to_string(group_size) + " on x " + to_string(x) + ", got " + to_string(scale));
  }
  *shape = {1, product(expected, 0, expected.size()), group_size};
  return {};
}

// Per channel: scale is [x.size(axis)].
inline Status channel_shape(const Sizes& x, const Sizes& scale, int64_t axis, QuantShape* shape) {
  const int64_t ndim = static_cast<int64_t>(x.size());
  if (axis < -ndim || axis >= ndim) {
    return Status::invalid("axis: expected one of the " + std::to_string(ndim) + " axes of x " + to_string(x) +
                           ", got " + std::to_string(axis));
  }
  const size_t channel = static_cast<size_t>(axis < 0 ? axis + ndim : axis);
  if (scale != Sizes{x[channel]}) {
    return Status::invalid("scale: expected shape " + to_string({x[channel]}) + " for axis " + std::to_string(axis) +
                           " of x " + to_string(x) + ", got " + to_string(scale));
  }
  *shape = {product(x, 0, channel), x[channel], product(x, channel + 1, x.size())};
  return {};
}

// Neither axis nor group_size: per tensor, scale has one element.
inline Status resolve_quant_shape(const Sizes& x, const Sizes& scale, std::optional<int64_t> axis,
                                  std::optional<int64_t> group_size, QuantShape* shape) {
  if (axis && group_size) return Status::invalid("axis, group_size: give one of the two, not both");
  if (group_size) return group_shape(x, scale, *group_size, shape);
  if (axis) return channel_shape(x, scale, *axis, shape);
  if (product(scale, 0, scale.size()) != 1) {
    return Status::invalid(
        "scale: expected one element (per tensor) when neither axis nor group_size is given, got shape " +
        to_string(scale));
  }
  *shape = {1, 1, product(x, 0, x.size())};
  return {};
}

// Whether two buffers of so many bytes share some, without being the same: an element would be written before another
// is read from its place.
inline bool overlap_partly(const void* a, const void* b, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(a);
  const auto second = reinterpret_cast<uintptr_t>(b);
  const uintptr_t distance = first < second ? second - first : first - second;
  return distance != 0 && distance < bytes;
}

// The range within which the core's arithmetic is exact (see fake_quant.h).
constexpr int64_t kQuantMinLimit = -(int64_t{1} << 23);
constexpr int64_t kQuantMaxLimit = int64_t{1} << 23;

inline Status narrow_quant_range(int64_t quant_min, int64_t quant_max, QuantGrid* grid) {
  if (quant_min < kQuantMinLimit || quant_max > kQuantMaxLimit || quant_min >= quant_max) {
    return Status::invalid("quant_min, quant_max: expected quant_min < quant_max within [-2^23, 2^23], got " +
                           std::to_string(quant_min) + " and " + std::to_string(quant_max));
  }
  grid->quant_min = static_cast<int32_t>(quant_min);
  grid->quant_max = static_cast<int32_t>(quant_max);
  return {};
}

// The integer type that quantize() returns for a grid: int8 where it fits, else uint8, else int32.
inline QType smallest_qtype(int64_t quant_min, int64_t quant_max) {
  if (quant_min >= -128 && quant_max <= 127) return QType::kInt8;
  if (quant_min >= 0 && quant_max <= 255) return QType::kUInt8;
  return QType::kInt32;
}

}  // namespace kdq::bindings
