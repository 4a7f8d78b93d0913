// kdq_kernels._C: bit planes on NumPy arrays. See numpy.cpp. They are int64, as all bits.
#include "numpy_bitplanes.h"

#include <pybind11/stl.h>

#include "kdq/bitplanes.h"
#include "layer_args.h"
#include "numpy_common.h"

namespace kdq::bindings {
namespace {

using OptionalArray = std::optional<py::array>;

PlaneForm plane_form(const char* argument, const std::string& name) {
  PlaneForm form = PlaneForm::kUnsigned;
  check(plane_form_from_name(argument, name, &form));
  return form;
}

// Planes of shape [bits, ..., binary_words(k)].
py::array expect_planes(const char* name, const py::array& a, int64_t k, int ndim = -1) {
  py::array planes = expect<int64_t>(name, a, ndim);
  if (k < 0) invalid("k: expected at least 0, got " + std::to_string(k));
  if (planes.ndim() < 2 || planes.shape(planes.ndim() - 1) != binary_words(k)) {
    invalid(std::string(name) + ": expected shape [bits, ..., " + std::to_string(binary_words(k)) +
            "] for k = " + std::to_string(k) + ", got " + to_string(sizes_of(a)));
  }
  return planes;
}

py::array pack_bitplanes_array(const py::array& q_in, int64_t bits, const std::string& form_name) {
  const PlaneForm form = plane_form("form", form_name);
  const py::array q = form == PlaneForm::kUnsigned ? expect<uint8_t>("q", q_in) : expect<int8_t>("q", q_in);
  const int64_t rows = rows_of("q", q);
  check(check_plane_count("bits", bits, form));
  Sizes sizes = sizes_of(q);
  const int64_t k = sizes.back();
  sizes.back() = binary_words(k);
  sizes.insert(sizes.begin(), bits);
  py::array planes = empty(py::dtype::of<int64_t>(), sizes);
  uint64_t* planes_data = data<uint64_t>(planes);
  run([&, q_data = q.data()] {
    return pack_bitplanes(q_data, rows, k, static_cast<int>(bits), form, planes_data, default_executor());
  });
  return planes;
}

py::array unpack_bitplanes_array(const py::array& planes_in, int64_t k, const std::string& form_name) {
  const PlaneForm form = plane_form("form", form_name);
  const py::array planes = expect_planes("planes", planes_in, k);
  Sizes sizes = sizes_of(planes);
  const int64_t bits = sizes.front();
  check(check_plane_count("planes", bits, form));
  sizes.erase(sizes.begin());
  const int64_t rows = product(sizes, 0, sizes.size() - 1);
  sizes.back() = k;
  py::array q = empty(form == PlaneForm::kUnsigned ? py::dtype::of<uint8_t>() : py::dtype::of<int8_t>(), sizes);
  void* q_data = q.mutable_data();
  run([&, planes_data = const_data<uint64_t>(planes)] {
    return unpack_bitplanes(planes_data, rows, k, static_cast<int>(bits), form, q_data, default_executor());
  });
  return q;
}

// planes [bits, rows, words].
PlaneMatrix matrix_of(const char* name, const py::array& planes, PlaneForm form) {
  check(check_plane_count(name, planes.shape(0), form));
  return {const_data<uint64_t>(planes), planes.shape(1), static_cast<int>(planes.shape(0)), form};
}

py::array bitplane_matmul_array(const py::array& a_in, const py::array& b_in, int64_t k, const std::string& a_form,
                                const std::string& b_form) {
  const py::array a = expect_planes("a_planes", a_in, k, 3);
  const py::array b = expect_planes("b_planes", b_in, k, 3);
  const PlaneMatrix of_a = matrix_of("a_planes", a, plane_form("a_form", a_form));
  const PlaneMatrix of_b = matrix_of("b_planes", b, plane_form("b_form", b_form));
  py::array out = empty(py::dtype::of<int32_t>(), {of_a.rows, of_b.rows});
  int32_t* out_data = data<int32_t>(out);
  run([&] { return bitplane_matmul(of_a, of_b, k, out_data, default_executor()); });
  return out;
}

py::array bitplane_linear_array(const py::array& x_in, const py::array& weight_planes, const py::array& weight_sum_in,
                                const py::array& weight_scale_in, const OptionalArray& bias_in, float input_scale,
                                std::optional<int64_t> input_zero_point, int64_t input_quant_max,
                                const std::string& weight_form, const std::optional<std::string>& activation) {
  BitplaneLinear args;
  args.dtype = float_dtype("x", x_in);
  args.m = rows_of("x", x_in);
  const py::array x = dense(x_in);
  Sizes sizes = sizes_of(x);
  args.k = sizes.back();
  const py::array planes = expect_planes("weight_planes", weight_planes, args.k, 3);
  args.weight = matrix_of("weight_planes", planes, plane_form("weight_form", weight_form));
  const int64_t n = args.weight.rows;
  const py::array weight_sum = expect_vector<int32_t>("weight_sum", weight_sum_in, n);
  const py::array weight_scale = expect_vector<float>("weight_scale", weight_scale_in, n);
  const py::array bias = bias_in ? expect_vector<float>("bias", *bias_in, n) : py::array();
  check(activation_from_name(activation, &args.activation));
  Int8Linear grid;
  check(set_static_input(input_scale, input_zero_point, input_quant_max, &grid));
  args.input_scale = grid.input_scale;
  args.input_zero_point = grid.input_zero_point;
  args.input_quant_max = grid.input_quant_max;
  sizes.back() = n;
  py::array y = empty(x.dtype(), sizes);
  args.x = x.data();
  args.y = y.mutable_data();
  args.weight_sum = const_data<int32_t>(weight_sum);
  args.weight_scale = const_data<float>(weight_scale);
  args.bias = bias_in ? const_data<float>(bias) : nullptr;
  run([&] { return bitplane_linear(args, default_executor()); });
  return y;
}

}  // namespace

void bind_bitplanes(py::module_& m) {
  m.def("bitplane_pairs", [] {
    int pairs = 0;
    check(bitplane_pairs(&pairs));
    return pairs;
  });
  m.def("pack_bitplanes", &pack_bitplanes_array, py::arg("q"), py::arg("bits"), py::arg("form"));
  m.def("unpack_bitplanes", &unpack_bitplanes_array, py::arg("planes"), py::arg("k"), py::arg("form"));
  m.def("bitplane_matmul", &bitplane_matmul_array, py::arg("a_planes"), py::arg("b_planes"), py::arg("k"),
        py::arg("a_form"), py::arg("b_form"));
  m.def("bitplane_linear", &bitplane_linear_array, py::arg("x"), py::arg("weight_planes"), py::arg("weight_sum"),
        py::arg("weight_scale"), py::arg("bias"), py::arg("input_scale"), py::arg("input_zero_point"),
        py::arg("input_quant_max"), py::arg("weight_form"), py::arg("activation"));
}

}  // namespace kdq::bindings
