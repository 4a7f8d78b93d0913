// kdq_kernels._C, second half: what the library was built with, what the machine has, and what it can do at most.
#include "introspection.h"

#include <pybind11/stl.h>

#include <string>
#include <utility>

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
#if defined(KDQ_TORCH_CALLS_VERSION)
  info["torch_calls"] = KDQ_TORCH_CALLS_VERSION;
#else
  info["torch_calls"] = py::none();
#endif
  info["cpu"] = cpu_name();
  info["cpu_features"] = cpu_features_string();
  info["isas"] = isas;
  return info;
}

// The peaks by the names that `kdq_kernels.machine_peaks()` gives them.
Peak peak_of(const std::string& name) {
  const std::pair<const char*, Peak> peaks[] = {
      {"int8_gops", Peak::kInt8},           {"binary_gops", Peak::kBinary}, {"float32_gflops", Peak::kFloat32},
      {"bfloat16_gflops", Peak::kBFloat16}, {"copy_gbps", Peak::kCopy},     {"read_gbps", Peak::kRead},
  };
  std::string expected;
  for (const auto& [known, peak] : peaks) {
    if (name == known) return peak;
    expected += expected.empty() ? known : std::string(", ") + known;
  }
  throw py::value_error("name: expected one of " + expected + ", got '" + name + "'");
}

double machine_peak(const std::string& name, int threads, int64_t bytes, double seconds) {
  const Peak peak = peak_of(name);
  double rate = 0;
  Status status;
  {
    py::gil_scoped_release release;
    status = measure_peak(peak, threads, bytes, seconds, &rate);
  }
  check(status);
  return rate / 1e9;
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
  m.def("machine_peak", &machine_peak, py::arg("name"), py::arg("threads"), py::arg("bytes"), py::arg("seconds"));
}

}  // namespace kdq::bindings
