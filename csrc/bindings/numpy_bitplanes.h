// Registers bit planes on NumPy arrays in kdq_kernels._C.
#pragma once

#include <pybind11/pybind11.h>

namespace kdq::bindings {

void bind_bitplanes(pybind11::module_& m);

}  // namespace kdq::bindings
