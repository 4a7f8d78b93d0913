// kdq_kernels._C: the codebook family on NumPy arrays. See numpy.cpp. Packed indices are int32, as on tensors.
#include "numpy_codebook.h"

#include <pybind11/stl.h>

#include "kdq/codebook.h"
#include "layer_args.h"
#include "numpy_common.h"

namespace kdq::bindings {
namespace {

py::array pack_indices_array(const py::array& indices_in, int64_t bits) {
  const py::array indices = expect<uint8_t>("indices", indices_in, 2);
  check(check_index_bits(bits));
  const int64_t n = indices.shape(0);
  const int64_t k = indices.shape(1);
  const int width = static_cast<int>(bits);
  py::array packed = empty(py::dtype::of<int32_t>(), {codebook_panels(n), codebook_words(k, width), kCodebookLanes});
  uint32_t* packed_data = data<uint32_t>(packed);
  run([&, indices_data = const_data<uint8_t>(indices)] {
    return pack_indices(indices_data, n, k, width, packed_data, default_executor());
  });
  return packed;
}

py::array unpack_indices_array(const py::array& packed_in, int64_t bits, int64_t n, int64_t k) {
  const py::array packed = expect<int32_t>("packed", packed_in, 3);
  check(check_index_bits(bits));
  const int width = static_cast<int>(bits);
  if (k < 0) invalid("k: expected at least 0, got " + std::to_string(k));
  check(check_packed_indices(sizes_of(packed), n, k, width));
  py::array indices = empty(py::dtype::of<uint8_t>(), {n, k});
  uint8_t* indices_data = data<uint8_t>(indices);
  run([&, packed_data = const_data<uint32_t>(packed)] {
    return unpack_indices(packed_data, n, k, width, indices_data, default_executor());
  });
  return indices;
}

py::array codebook_linear_array(const py::array& x_in, const py::array& packed_in, const py::array& codebook_in,
                                int64_t out_features, const std::optional<py::array>& bias_in,
                                const std::optional<std::string>& activation) {
  CodebookLinear args;
  args.dtype = float_dtype("x", x_in);
  args.m = rows_of("x", x_in);
  const py::array x = dense(x_in);
  Sizes sizes = sizes_of(x);
  args.k = sizes.back();
  args.n = out_features;
  const py::array codebook = expect<float>("codebook", codebook_in, 1);
  check(codebook_bits(codebook.shape(0), &args.bits));
  const py::array packed = expect<int32_t>("packed", packed_in, 3);
  check(check_packed_indices(sizes_of(packed), args.n, args.k, args.bits));
  const py::array bias = bias_in ? expect_vector<float>("bias", *bias_in, args.n) : py::array();
  check(activation_from_name(activation, &args.activation));
  sizes.back() = args.n;
  py::array y = empty(x.dtype(), sizes);
  args.x = x.data();
  args.y = y.mutable_data();
  args.packed = const_data<uint32_t>(packed);
  args.codebook = const_data<float>(codebook);
  args.bias = bias_in ? const_data<float>(bias) : nullptr;
  run([&] { return codebook_linear(args, default_executor()); });
  return y;
}

}  // namespace

void bind_codebook(py::module_& m) {
  m.def("pack_indices", &pack_indices_array, py::arg("indices"), py::arg("bits"));
  m.def("unpack_indices", &unpack_indices_array, py::arg("packed"), py::arg("bits"), py::arg("n"), py::arg("k"));
  m.def("codebook_linear", &codebook_linear_array, py::arg("x"), py::arg("packed"), py::arg("codebook"),
        py::arg("out_features"), py::arg("bias"), py::arg("activation"));
}

}  // namespace kdq::bindings
