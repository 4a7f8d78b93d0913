// Small helpers of the pybind11 bindings: Status to exception, and arrays checked before their pointers are used.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "kdq/status.h"
#include "kdq/types.h"
#include "quant_layout.h"

namespace kdq::bindings {

namespace py = pybind11;

// kInvalidArgument -> ValueError, anything else -> RuntimeError.
inline void check(const Status& status) {
  if (status.ok()) return;
  if (status.code() == StatusCode::kInvalidArgument) throw py::value_error(status.message());
  throw std::runtime_error(status.message());
}

[[noreturn]] inline void invalid(const std::string& message) { throw py::value_error(message); }

inline std::string dtype_name(const py::array& a) { return py::str(py::object(a.dtype())); }

inline Sizes sizes_of(const py::array& a) { return {a.shape(), a.shape() + a.ndim()}; }

template <class T>
bool has_dtype(const py::array& a) {
  return a.dtype().equal(py::dtype::of<T>());
}

// The same array when it is C-contiguous (no copy), else a contiguous copy of it.
inline py::array dense(const py::array& a) {
  if ((a.flags() & py::array::c_style) != 0) return a;
  return py::array::ensure(a, py::array::c_style);
}

// A contiguous array of exactly this dtype and number of axes; ndim < 0 allows any number.
template <class T>
py::array expect(const char* name, const py::array& a, int ndim = -1) {
  if (!has_dtype<T>(a)) {
    invalid(std::string(name) + ": expected dtype " + std::string(py::str(py::object(py::dtype::of<T>()))) + ", got " +
            dtype_name(a));
  }
  if (ndim >= 0 && a.ndim() != ndim) {
    invalid(std::string(name) + ": expected " + std::to_string(ndim) + " axes, got shape " + to_string(sizes_of(a)));
  }
  return dense(a);
}

// As expect(), but [n] exactly.
template <class T>
py::array expect_vector(const char* name, const py::array& a, int64_t n) {
  py::array vector = expect<T>(name, a, 1);
  if (vector.shape(0) != n) {
    invalid(std::string(name) + ": expected shape " + to_string({n}) + ", got " + to_string(sizes_of(a)));
  }
  return vector;
}

inline DType float_dtype(const char* name, const py::array& a) {
  if (has_dtype<float>(a)) return DType::kFloat32;
  if (a.dtype().equal(py::dtype("float16"))) return DType::kFloat16;
  invalid(std::string(name) + ": expected dtype float32 or float16, got " + dtype_name(a));
}

// Calls a kernel without the GIL.
template <class Function>
void run(Function&& function) {
  Status status;
  {
    py::gil_scoped_release release;
    status = function();
  }
  check(status);
}

// An uninitialised array: the kernels write every element.
inline py::array empty(const py::dtype& dtype, const Sizes& sizes) {
  return py::array(dtype, std::vector<py::ssize_t>(sizes.begin(), sizes.end()));
}

template <class T>
T* data(py::array& a) {
  return static_cast<T*>(a.mutable_data());
}

template <class T>
const T* const_data(const py::array& a) {
  return static_cast<const T*>(a.data());
}

// The rows of x [..., k]: every leading axis folded into one.
inline int64_t rows_of(const char* name, const py::array& x) {
  if (x.ndim() < 1) invalid(std::string(name) + ": expected at least one axis, got a 0-d array");
  return product(sizes_of(x), 0, static_cast<size_t>(x.ndim() - 1));
}

}  // namespace kdq::bindings
