// Arguments that the NumPy and the torch binding spell alike and the core takes in another form.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kdq/bitplanes.h"
#include "kdq/codebook.h"
#include "kdq/int8_gemm.h"
#include "quant_layout.h"

namespace kdq::bindings {

// A packed weight is a uint8 array [n, ceil(bytes / n)], so that shape inference knows n without reading the blob. With
// no channels there is nothing to pack: it is [0, k].
inline Status packed_tensor_sizes(int64_t n, int64_t k, int bits, Sizes* sizes) {
  size_t bytes = 0;
  Status status = int8_packed_bytes(n, k, &bytes, bits);
  if (status.ok()) *sizes = {n, n == 0 ? k : (static_cast<int64_t>(bytes) + n - 1) / n};
  return status;
}

struct PackedShape {
  int64_t n = 0;
  int64_t k = 0;
};

// The shape of the weight in a packed array of sizes [rows, row_bytes] at data, checked.
inline Status packed_array_shape(const void* data, int64_t rows, int64_t row_bytes, PackedShape* shape) {
  if (rows == 0) {
    *shape = {0, row_bytes};
    return {};
  }
  Status status = int8_packed_shape(data, static_cast<size_t>(rows * row_bytes), &shape->n, &shape->k);
  if (status.ok() && shape->n != rows) {
    return Status::invalid("packed: the blob holds " + std::to_string(shape->n) + " channels, but the array has " +
                           std::to_string(rows) + " rows");
  }
  return status;
}

inline Status check_same_k(const char* name, int64_t k, const PackedShape& packed) {
  if (k == packed.k) return {};
  return Status::invalid(std::string(name) + ": has K = " + std::to_string(k) +
                         ", but the packed weight has K = " + std::to_string(packed.k));
}

inline Status activation_from_name(const std::optional<std::string>& name, Activation* activation) {
  if (!name) {
    *activation = Activation::kNone;
  } else if (*name == "relu") {
    *activation = Activation::kRelu;
  } else if (*name == "gelu") {
    *activation = Activation::kGelu;
  } else if (*name == "silu") {
    *activation = Activation::kSilu;
  } else {
    return Status::invalid("activation: expected None, 'relu', 'gelu' or 'silu', got '" + *name + "'");
  }
  return {};
}

inline Status plane_form_from_name(const char* argument, const std::string& name, PlaneForm* form) {
  if (name == "unsigned") {
    *form = PlaneForm::kUnsigned;
  } else if (name == "signed") {
    *form = PlaneForm::kSigned;
  } else if (name == "odd") {
    *form = PlaneForm::kOdd;
  } else {
    return Status::invalid(std::string(argument) + ": expected 'unsigned', 'signed' or 'odd', got '" + name + "'");
  }
  return {};
}

// Of a tensor's first axis, or an argument.
inline Status check_plane_count(const char* name, int64_t bits, PlaneForm form) {
  const int64_t most = form == PlaneForm::kOdd ? kMostOddBits : kMostPlaneBits;
  if (bits >= 1 && bits <= most) return {};
  return Status::invalid(std::string(name) + ": expected 1 to " + std::to_string(most) + " bits" +
                         (form == PlaneForm::kOdd ? " of odd integers" : "") + ", got " + std::to_string(bits));
}

// The bits of an index, from the length of the codebook.
inline Status codebook_bits(int64_t centroids, int* bits) {
  for (*bits = 1; *bits <= kCodebookMaxBits; ++*bits) {
    if (centroids == int64_t{1} << *bits) return {};
  }
  return Status::invalid("codebook: expected 2, 4, 8, 16 or 32 centroids, got " + std::to_string(centroids));
}

inline Status check_index_bits(int64_t bits) {
  if (bits >= 1 && bits <= kCodebookMaxBits) return {};
  return Status::invalid("bits: expected 1 to 5, got " + std::to_string(bits));
}

// `packed` has the shape that pack_indices() gives an [n, k] weight.
inline Status check_packed_indices(const Sizes& packed, int64_t n, int64_t k, int bits) {
  if (n < 0) return Status::invalid("n: expected at least 0, got " + std::to_string(n));
  const Sizes expected = {codebook_panels(n), codebook_words(k, bits), kCodebookLanes};
  if (packed == expected) return {};
  return Status::invalid("packed: expected shape " + to_string(expected) + " for " + std::to_string(n) + " x " +
                         std::to_string(k) + " indices of " + std::to_string(bits) + " bits, got " + to_string(packed));
}

// No input_scale: dynamic. With one: static; a missing zero point means a symmetric grid around its middle, so that
// input_quant_max = 255 covers -128 ... 127.
inline Status set_static_input(std::optional<float> input_scale, std::optional<int64_t> input_zero_point,
                               int64_t input_quant_max, Int8Linear* args) {
  args->is_static = input_scale.has_value();
  if (!args->is_static) {
    if (!input_zero_point) return {};
    return Status::invalid("input_zero_point: given without input_scale; static quantization needs both");
  }
  if (input_quant_max < 1 || input_quant_max > 255) {
    return Status::invalid("input_quant_max: expected 1 to 255, got " + std::to_string(input_quant_max));
  }
  const int64_t zero_point = input_zero_point.value_or((input_quant_max + 1) / 2);
  if (zero_point < 0 || zero_point > input_quant_max) {
    return Status::invalid("input_zero_point: expected 0 to " + std::to_string(input_quant_max) + ", got " +
                           std::to_string(zero_point));
  }
  args->input_scale = *input_scale;
  args->input_zero_point = static_cast<int32_t>(zero_point);
  args->input_quant_max = static_cast<int32_t>(input_quant_max);
  return {};
}

}  // namespace kdq::bindings
