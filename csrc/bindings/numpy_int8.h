// Registers the int8 family on NumPy arrays in kdq_kernels._C.
#pragma once

#include <pybind11/pybind11.h>

namespace kdq::bindings {

void bind_int8(pybind11::module_& m);

}  // namespace kdq::bindings
