// What the torch operators share: tensors checked before their pointers are used.
//
// An operator is a template on where it runs: Cpu (torch_cpu.h) or Cuda (cuda/torch_cuda.h), an object, by convention
// called `on`, made from the name and the value of the tensor that all others must be with. It allocates results, knows
// which tensors are in its reach (has(); kind() says it in words) and calls that device's kernels under the names of
// kdq/*.h. What is checked, and what the errors say, is the same on both.
//
// Only the libtorch stable ABI is used (torch/csrc/stable, torch/headeronly), so that one binary serves torch 2.10 and
// newer. Invalid arguments leave as std::invalid_argument, which torch's Python side turns into ValueError.
#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "kdq/status.h"
#include "kdq/types.h"
#include "quant_layout.h"
#include "torch_operator.h"
#include "torch_tensor.h"

namespace kdq::bindings {

[[noreturn]] inline void invalid(const std::string& message) { throw std::invalid_argument(message); }

inline void check(const Status& status) {
  if (status.ok()) return;
  if (status.code() == StatusCode::kInvalidArgument) invalid(status.message());
  throw std::runtime_error(status.message());
}

inline std::string type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline int32_t shim_dtype(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

inline bool has_dtype(const Tensor& t, ScalarType type) { return t.shim_dtype() == shim_dtype(type); }

inline Sizes sizes_of(const Tensor& t) { return {t.sizes(), t.sizes() + t.dim()}; }

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : contiguous(t); }

// A contiguous tensor in reach.
template <class On>
Tensor expect_here(const On& on, const char* name, const Tensor& t) {
  if (!on.has(t)) invalid(std::string(name) + ": expected " + on.kind());
  return dense(t);
}

// A contiguous tensor in reach, of exactly this dtype; ndim < 0 allows any number of axes.
template <class On>
Tensor expect(const On& on, const char* name, const Tensor& t, ScalarType type, int64_t ndim = -1) {
  if (!on.has(t)) invalid(std::string(name) + ": expected " + on.kind());
  if (!has_dtype(t, type)) {
    invalid(std::string(name) + ": expected dtype " + type_name(type) + ", got " + type_name(t.scalar_type()));
  }
  if (ndim >= 0 && t.dim() != ndim) {
    invalid(std::string(name) + ": expected " + std::to_string(ndim) + " axes, got shape " + to_string(sizes_of(t)));
  }
  return dense(t);
}

// As expect(), but [n] exactly.
template <class On>
Tensor expect_vector(const On& on, const char* name, const Tensor& t, int64_t n, ScalarType type = ScalarType::Float) {
  Tensor vector = expect(on, name, t, type, 1);
  if (vector.size(0) != n) {
    invalid(std::string(name) + ": expected shape " + to_string({n}) + ", got " + to_string(sizes_of(t)));
  }
  return vector;
}

inline DType float_dtype(const char* name, const Tensor& t) {
  if (has_dtype(t, ScalarType::Float)) return DType::kFloat32;
  if (has_dtype(t, ScalarType::BFloat16)) return DType::kBFloat16;
  if (has_dtype(t, ScalarType::Half)) return DType::kFloat16;
  invalid(std::string(name) + ": expected dtype float32, bfloat16 or float16, got " + type_name(t.scalar_type()));
}

// The rows of x [..., k]: every leading axis folded into one.
inline int64_t rows_of(const char* name, const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (last < 0) invalid(std::string(name) + ": expected at least one axis, got a 0-d tensor");
  int64_t rows = 1;
  for (int64_t axis = 0; axis < last; ++axis) rows *= x.size(axis);
  return rows;
}

inline size_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Long:
      return 8;
    case ScalarType::Char:
    case ScalarType::Byte:
      return 1;
    default:
      throw std::logic_error("kdq: no operator makes results of " + type_name(type));
  }
}

// Contiguous, uninitialised: the kernels write every element.
template <class On>
Tensor empty(const On& on, const Sizes& sizes, ScalarType type) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  return on.empty_strided(sizes, strides, type);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace kdq::bindings
