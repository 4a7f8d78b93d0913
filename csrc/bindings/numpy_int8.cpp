// kdq_kernels._C: the int8 family on NumPy arrays.
#include "numpy_int8.h"

#include <pybind11/stl.h>

#include "kdq/int8_gemm.h"
#include "layer_args.h"
#include "numpy_common.h"
#include "numpy_images.h"

namespace kdq::bindings {
namespace {

using OptionalArray = std::optional<py::array>;
using OptionalInt = std::optional<int64_t>;

py::array pack_int8_weight_array(const py::array& w_in, int bits) {
  const py::array w = expect<int8_t>("w", w_in, 2);
  const int64_t n = w.shape(0);
  const int64_t k = w.shape(1);
  Sizes sizes;
  check(packed_tensor_sizes(n, k, bits, &sizes));
  py::array packed = empty(py::dtype::of<uint8_t>(), sizes);
  if (n == 0) return packed;
  void* packed_data = packed.mutable_data();
  const size_t packed_bytes = static_cast<size_t>(packed.nbytes());
  run([&, w_data = const_data<int8_t>(w)] {
    return pack_int8_weight(w_data, n, k, packed_data, packed_bytes, default_executor(), bits);
  });
  return packed;
}

struct Packed {
  py::array blob;
  PackedShape shape;

  const void* data() const { return blob.data(); }
  size_t bytes() const { return static_cast<size_t>(blob.nbytes()); }
};

Packed parse_packed(const char* name, const py::array& packed) {
  Packed p;
  p.blob = expect<uint8_t>(name, packed, 2);
  check(packed_array_shape(p.blob.data(), p.blob.shape(0), p.blob.shape(1), &p.shape));
  return p;
}

py::array unpack_int8_weight_array(const py::array& packed) {
  const Packed p = parse_packed("packed", packed);
  py::array w = empty(py::dtype::of<int8_t>(), {p.shape.n, p.shape.k});
  int8_t* w_data = data<int8_t>(w);
  if (p.shape.n > 0) {
    run([&, blob = p.data(), bytes = p.bytes()] {
      return unpack_int8_weight(blob, bytes, w_data, default_executor());
    });
  }
  return w;
}

py::array int8_matmul_array(const py::array& a_in, const py::array& b) {
  const py::array a = expect<int8_t>("a", a_in, 2);
  const Packed p = parse_packed("b", has_dtype<int8_t>(b) ? pack_int8_weight_array(b, 8) : b);
  const int64_t m = a.shape(0);
  const int64_t k = a.shape(1);
  check(check_same_k("a", k, p.shape));
  py::array out = empty(py::dtype::of<int32_t>(), {m, p.shape.n});
  int32_t* out_data = data<int32_t>(out);
  if (p.shape.n > 0) {
    run([&, a_data = const_data<int8_t>(a), blob = p.data(), bytes = p.bytes()] {
      return int8_matmul(a_data, m, k, blob, bytes, out_data, default_executor());
    });
  }
  return out;
}

Activation parse_activation(const std::optional<std::string>& name) {
  Activation activation = Activation::kNone;
  check(activation_from_name(name, &activation));
  return activation;
}

py::array int8_linear_array(const py::array& x_in, const py::array& packed, const py::array& weight_scale_in,
                            const OptionalArray& bias_in, std::optional<float> input_scale,
                            OptionalInt input_zero_point, int32_t input_quant_max,
                            const std::optional<std::string>& activation, bool weight_only) {
  Int8Linear args;
  args.dtype = float_dtype("x", x_in);
  args.m = rows_of("x", x_in);
  const py::array x = dense(x_in);
  const Packed p = parse_packed("packed", packed);
  const py::array weight_scale = expect_vector<float>("weight_scale", weight_scale_in, p.shape.n);
  const py::array bias = bias_in ? expect_vector<float>("bias", *bias_in, p.shape.n) : py::array();
  Sizes sizes = sizes_of(x);
  args.k = sizes.back();
  check(check_same_k("x", args.k, p.shape));
  sizes.back() = p.shape.n;
  py::array y = empty(x.dtype(), sizes);
  args.x = x.data();
  args.y = y.mutable_data();
  args.packed = p.data();
  args.packed_bytes = p.bytes();
  args.weight_scale = const_data<float>(weight_scale);
  args.bias = bias_in ? const_data<float>(bias) : nullptr;
  args.activation = parse_activation(activation);
  check(set_static_input(input_scale, input_zero_point, input_quant_max, &args));
  if (p.shape.n == 0) return y;
  run([&] {
    return weight_only ? int8_weight_only_linear(args, default_executor()) : int8_linear(args, default_executor());
  });
  return y;
}

// x channels last.
py::array int8_conv2d_array(const py::array& x, const py::array& packed, const py::array& weight_scale_in,
                            const OptionalArray& bias_in, const Pair& kernel_size, const Pair& stride,
                            const Pair& padding, const Pair& dilation, std::optional<float> input_scale,
                            OptionalInt input_zero_point, int32_t input_quant_max,
                            const std::optional<std::string>& activation) {
  const Images images = parse_images(x, kernel_size, stride, padding, dilation);
  const Packed p = parse_packed("packed", packed);
  const py::array weight_scale = expect_vector<float>("weight_scale", weight_scale_in, p.shape.n);
  const py::array bias = bias_in ? expect_vector<float>("bias", *bias_in, p.shape.n) : py::array();
  Int8Conv2d args;
  args.shape = images.shape;
  args.layer.k = kernel_size.first * kernel_size.second * images.shape.channels;
  check(check_same_k("x", args.layer.k, p.shape));
  py::array y = images.result(p.shape.n);
  args.layer.dtype = images.dtype;
  args.layer.x = images.x.data();
  args.layer.y = y.mutable_data();
  args.layer.packed = p.data();
  args.layer.packed_bytes = p.bytes();
  args.layer.weight_scale = const_data<float>(weight_scale);
  args.layer.bias = bias_in ? const_data<float>(bias) : nullptr;
  args.layer.activation = parse_activation(activation);
  check(set_static_input(input_scale, input_zero_point, input_quant_max, &args.layer));
  if (y.size() > 0) run([&] { return int8_conv2d(args, default_executor()); });
  return y;
}

}  // namespace

void bind_int8(py::module_& m) {
  const py::arg x("x");
  const py::arg packed("packed");
  const py::arg weight_scale("weight_scale");
  const py::arg bias("bias");
  const py::arg input_scale("input_scale");
  const py::arg input_zero_point("input_zero_point");
  const py::arg input_quant_max("input_quant_max");
  const py::arg activation("activation");
  m.def("pack_int8_weight", &pack_int8_weight_array, py::arg("w"), py::arg("bits"));
  m.def("unpack_int8_weight", &unpack_int8_weight_array, packed);
  m.def("int8_matmul", &int8_matmul_array, py::arg("a"), py::arg("b"));
  m.def("int8_linear", &int8_linear_array, x, packed, weight_scale, bias, input_scale, input_zero_point,
        input_quant_max, activation, py::arg("weight_only"));
  m.def("int8_conv2d", &int8_conv2d_array, x, packed, weight_scale, bias, py::arg("kernel_size"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), input_scale, input_zero_point, input_quant_max, activation);
}

}  // namespace kdq::bindings
