// Registers the introspection functions of kdq_kernels._C.
#pragma once

#include <pybind11/pybind11.h>

namespace kdq::bindings {

void bind_introspection(pybind11::module_& m);

}  // namespace kdq::bindings
