// The element types that cross the C++ interface. Buffers are untyped pointers plus one of these.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kdq {

// Activations. bfloat16 is the upper half of a float32; float16 is IEEE 754 binary16.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Quantized integers.
enum class QType : int { kInt8 = 0, kUInt8 = 1, kInt32 = 2 };

// What a linear op applies to its float result before the cast. kGelu is the exact, erf-based form.
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

constexpr size_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
constexpr size_t qtype_size(QType qtype) { return qtype == QType::kInt32 ? 4 : 1; }

}  // namespace kdq
