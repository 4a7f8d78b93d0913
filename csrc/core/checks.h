// Checks of arguments that need no look into the buffers: those that a call on a GPU can make too.
#pragma once

#include <cmath>
#include <string>

#include "core/format.h"
#include "kdq/codebook.h"
#include "kdq/distillation.h"
#include "kdq/fake_quant.h"

namespace kdq {

inline Status check_shape(const QuantShape& s) {
  if (s.outer < 0 || s.channels < 0 || s.inner < 0) return Status::invalid("shape: expected sizes of at least 0");
  int64_t n = 0;
  if (__builtin_mul_overflow(s.outer, s.channels, &n) || __builtin_mul_overflow(n, s.inner, &n)) {
    return Status::invalid("shape: the number of elements does not fit 64 bits");
  }
  return {};
}

inline Status check_range(const QuantGrid& grid) {
  constexpr int32_t kIntegerLimit = 1 << 23;
  if (grid.quant_min >= grid.quant_max || grid.quant_min < -kIntegerLimit || grid.quant_max > kIntegerLimit) {
    return Status::invalid("quant_min, quant_max: expected quant_min < quant_max within [-2^23, 2^23], got " +
                           std::to_string(grid.quant_min) + " and " + std::to_string(grid.quant_max));
  }
  return {};
}

inline Status check_fits(QType qtype, const QuantGrid& grid) {
  const bool fits = qtype == QType::kInt32 ||
                    (qtype == QType::kInt8 && grid.quant_min >= -128 && grid.quant_max <= 127) ||
                    (qtype == QType::kUInt8 && grid.quant_min >= 0 && grid.quant_max <= 255);
  if (fits) return {};
  return Status::invalid("quant_min, quant_max: [" + std::to_string(grid.quant_min) + ", " +
                         std::to_string(grid.quant_max) + "] does not fit " +
                         (qtype == QType::kInt8 ? "int8" : "uint8"));
}

// A grid's pointers.
inline Status check_grid_pointers(const QuantGrid& grid, int64_t channels) {
  if (channels == 0) return {};
  if (grid.scale == nullptr) return Status::invalid("scale: expected a pointer, got null");
  if (grid.zero_point_kind != ZeroPointKind::kNone && grid.zero_point == nullptr) {
    return Status::invalid("zero_point: expected a pointer, got null");
  }
  return {};
}

// Sizes of a binary product.
inline Status check_binary_sizes(int64_t m, int64_t n, int64_t k) {
  if (m < 0 || n < 0 || k < 0 || k > INT32_MAX) {
    return Status::invalid("m, n, k: expected at least 0, and k below 2^31, got " + std::to_string(m) + ", " +
                           std::to_string(n) + ", " + std::to_string(k));
  }
  return {};
}

// Sizes of a codebook layer, and the bits of its indices.
inline Status check_codebook_sizes(int64_t m, int64_t n, int64_t k, int bits) {
  if (m < 0 || n < 0 || k < 0 || n > INT32_MAX || k > INT32_MAX) {
    return Status::invalid("m, n, k: expected at least 0, and n, k below 2^31, got " + std::to_string(m) + ", " +
                           std::to_string(n) + ", " + std::to_string(k));
  }
  if (bits < 1 || bits > kCodebookMaxBits) {
    return Status::invalid("bits: expected 1 to 5, got " + std::to_string(bits));
  }
  return {};
}

inline Status check_distillation(const DistillationLoss& args) {
  if (args.rows < 0 || args.classes < 1) {
    return Status::invalid("student: expected at least 0 rows of at least 1 class, got " + std::to_string(args.rows) +
                           " of " + std::to_string(args.classes));
  }
  if (!(args.temperature > 0.0F) || !std::isfinite(args.temperature) || !std::isfinite(1.0F / args.temperature)) {
    return Status::invalid("temperature: expected positive and finite, with a finite reciprocal, got " +
                           format(args.temperature));
  }
  if (!(args.alpha >= 0.0F && args.alpha <= 1.0F)) {
    return Status::invalid("alpha: expected a number from 0 to 1, got " + format(args.alpha));
  }
  if (args.rows > 0 && (args.student == nullptr || args.teacher == nullptr)) {
    return Status::invalid("student, teacher: expected pointers, got null");
  }
  if (args.target == nullptr && args.alpha != 1.0F) {
    return Status::invalid("target: expected class indices, since alpha = " + format(args.alpha) +
                           " mixes in the labels; got none");
  }
  return {};
}

// The grid of static int8 activations. Null: a number in device memory, which is not looked at.
inline Status check_static_grid(const float* scale, const int32_t* zero_point, int32_t quant_max) {
  if (scale != nullptr && !(*scale > 0.0F && std::isfinite(*scale) && std::isfinite(1.0F / *scale))) {
    return Status::invalid("input_scale: expected positive and finite, with a finite reciprocal, got " +
                           format(*scale));
  }
  if (quant_max < 1 || quant_max > 255) {
    return Status::invalid("input_quant_max: expected 1 to 255, got " + std::to_string(quant_max));
  }
  if (zero_point != nullptr && (*zero_point < 0 || *zero_point > quant_max)) {
    return Status::invalid("input_zero_point: expected 0 to " + std::to_string(quant_max) + ", got " +
                           std::to_string(*zero_point));
  }
  return {};
}

// A buffer of n elements.
inline Status check_pointer(const char* name, const void* pointer, int64_t n) {
  if (pointer != nullptr || n == 0) return {};
  return Status::invalid(std::string(name) + ": expected a pointer, got null");
}

}  // namespace kdq
