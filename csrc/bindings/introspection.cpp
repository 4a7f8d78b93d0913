// kdq_kernels._C, second half: what the library was built with, what the machine has, and what it can do at most.
#include "introspection.h"

#include <pybind11/stl.h>

#include "kdq/kdq.h"
#include "numpy_common.h"

namespace kdq::bindings {
namespace {

py::dict build_info() {
  py::list isas;
  for (Isa isa : available_isas()) isas.append(isa_name(isa));
  py::dict info;
  info["version"] = KDQ_VERSION;
  info["compiler"] = KDQ_COMPILER;
  info["cpu"] = cpu_name();
  info["cpu_features"] = cpu_features_string();
  info["isas"] = isas;
  return info;
}

py::dict machine_peaks(int threads, int64_t copy_bytes, double seconds) {
  MachinePeaks peaks;
  Status status;
  {
    py::gil_scoped_release release;
    status = measure_peaks(threads, copy_bytes, seconds, &peaks);
  }
  check(status);
  py::dict result;
  result["threads"] = peaks.threads;
  result["int8_gops"] = peaks.int8_gops;
  result["binary_gops"] = peaks.binary_gops;
  result["float32_gflops"] = peaks.float32_gflops;
  result["copy_gbps"] = peaks.copy_gbps;
  result["copy_bytes"] = peaks.copy_bytes;
  return result;
}

}  // namespace

void bind_introspection(py::module_& m) {
  m.def("cpu_isa", [] {
    Isa isa = Isa::kReference;
    check(current_isa(&isa));
    return isa_name(isa);
  });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  m.def("set_isa", [](const std::string& name) { check(set_isa(name)); }, py::arg("name"));
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", [](int n) { check(set_num_threads(n)); }, py::arg("n"));
  m.def("build_info", &build_info);
  m.def("machine_peaks", &machine_peaks, py::arg("threads"), py::arg("copy_bytes"), py::arg("seconds"));
}

}  // namespace kdq::bindings
