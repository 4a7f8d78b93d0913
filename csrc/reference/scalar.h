// Scalar element access for the reference kernels: load as float32, store rounded half-to-even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/elements.h"
#include "core/tile_output.h"

namespace kdq::reference {

inline uint32_t bits_of(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float load(const float* p) { return *p; }
inline float load(const BFloat16* p) { return float_of(static_cast<uint32_t>(p->bits) << 16); }
inline float load(const Float16* p) {
  const float sign = (p->bits & 0x8000U) != 0 ? -1.0F : 1.0F;
  const int exponent = (p->bits >> 10) & 31;
  const int fraction = p->bits & 1023;
  if (exponent == 31) return fraction == 0 ? sign * INFINITY : std::copysign(NAN, sign);
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

inline void store(float* p, float value) { *p = value; }
inline void store(BFloat16* p, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = std::isnan(value) ? bits | 0x400000U : bits + 0x7FFFU + ((bits >> 16) & 1U);
  p->bits = static_cast<uint16_t>(rounded >> 16);
}
inline void store(Float16* p, float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000U;
  const float magnitude = std::fabs(value);
  uint32_t bits = 0x7E00U;  // NaN
  if (magnitude < 65520.0F) {
    // The spacing of float16 numbers at this magnitude; below 2^-14 it no longer shrinks.
    int exponent = -14;
    if (magnitude >= 0x1p-14F) exponent = std::ilogb(magnitude);
    const float steps = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
    // Carries from the fraction into the exponent by itself, denormals included.
    bits = static_cast<uint32_t>(static_cast<int>(steps) + ((exponent + 14) << 10));
  } else if (!std::isnan(value)) {
    bits = 0x7C00U;  // inf
  }
  p->bits = static_cast<uint16_t>(sign | bits);
}

// Element i of y, in the type of a tile's results.
inline void store_as(Result type, void* y, int64_t i, float value) {
  if (type == Result::kFloat32) store(static_cast<float*>(y) + i, value);
  if (type == Result::kBFloat16) store(static_cast<BFloat16*>(y) + i, value);
  if (type == Result::kFloat16) store(static_cast<Float16*>(y) + i, value);
}

}  // namespace kdq::reference
