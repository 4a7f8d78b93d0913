// kdq_kernels._C: the binary family on NumPy arrays. See numpy.cpp. Bits are int64 on the Python side (torch has no
// arithmetic on uint64); the words are the same.
#include "numpy_binary.h"

#include <pybind11/stl.h>

#include "kdq/binary_gemm.h"
#include "numpy_common.h"
#include "numpy_images.h"

namespace kdq::bindings {
namespace {

using OptionalArray = std::optional<py::array>;
using OptionalInt = std::optional<int64_t>;

py::array pack_signs_array(const py::array& x_in) {
  const DType dtype = float_dtype("x", x_in);
  const int64_t rows = rows_of("x", x_in);
  const py::array x = dense(x_in);
  Sizes sizes = sizes_of(x);
  const int64_t k = sizes.back();
  sizes.back() = binary_words(k);
  py::array bits = empty(py::dtype::of<int64_t>(), sizes);
  uint64_t* bits_data = data<uint64_t>(bits);
  run([&, x_data = x.data()] { return pack_signs(dtype, x_data, rows, k, bits_data, default_executor()); });
  return bits;
}

// Bits of shape [..., binary_words(k)].
py::array expect_bits(const char* name, const py::array& a, int64_t k, int ndim = -1) {
  py::array bits = expect<int64_t>(name, a, ndim);
  if (k < 0) invalid("k: expected at least 0, got " + std::to_string(k));
  if (bits.ndim() < 1 || bits.shape(bits.ndim() - 1) != binary_words(k)) {
    invalid(std::string(name) + ": expected " + std::to_string(binary_words(k)) +
            " words in the last axis for k = " + std::to_string(k) + ", got shape " + to_string(sizes_of(a)));
  }
  return bits;
}

py::array unpack_signs_array(const py::array& bits_in, int64_t k) {
  const py::array bits = expect_bits("bits", bits_in, k);
  const int64_t rows = rows_of("bits", bits);
  Sizes sizes = sizes_of(bits);
  sizes.back() = k;
  py::array x = empty(py::dtype::of<float>(), sizes);
  float* x_data = data<float>(x);
  run([&, bits_data = const_data<uint64_t>(bits)] {
    return unpack_signs(bits_data, rows, k, x_data, default_executor());
  });
  return x;
}

py::array binary_matmul_array(const py::array& a_in, const py::array& b_in, int64_t k) {
  const py::array a = expect_bits("a_bits", a_in, k, 2);
  const py::array b = expect_bits("b_bits", b_in, k, 2);
  py::array out = empty(py::dtype::of<int32_t>(), {a.shape(0), b.shape(0)});
  int32_t* out_data = data<int32_t>(out);
  run([&, a_data = const_data<uint64_t>(a), b_data = const_data<uint64_t>(b), m = a.shape(0), n = b.shape(0)] {
    return binary_matmul(a_data, b_data, m, n, k, out_data, default_executor());
  });
  return out;
}

// A layer's input: values, or their signs packed, which are int64 and need k.
struct BinaryInput {
  py::array x;
  const void* values = nullptr;
  const uint64_t* bits = nullptr;
  DType dtype = DType::kFloat32;
  int64_t m = 0;
  int64_t k = 0;

  // The result's shape for n elements in the last axis.
  Sizes sizes(int64_t n) const {
    Sizes result = sizes_of(x);
    result.back() = n;
    return result;
  }
};

BinaryInput parse_input(const py::array& x, OptionalInt k) {
  BinaryInput in;
  in.m = rows_of("x", x);
  if (has_dtype<int64_t>(x)) {
    if (!k) invalid("k: expected the number of features, since x holds packed signs (int64)");
    in.k = *k;
    in.x = expect_bits("x", x, in.k);
    in.bits = const_data<uint64_t>(in.x);
    return in;
  }
  in.dtype = float_dtype("x", x);
  in.x = dense(x);
  in.k = in.x.shape(in.x.ndim() - 1);
  if (k && *k != in.k) invalid("k: expected " + std::to_string(in.k) + ", as in x, or None, got " + std::to_string(*k));
  in.values = in.x.data();
  return in;
}

py::array binary_linear_array(const py::array& x, const py::array& weight_bits_in, const py::array& weight_scale_in,
                              const OptionalArray& bias_in, OptionalInt k) {
  const BinaryInput in = parse_input(x, k);
  const py::array weight_bits = expect_bits("weight_bits", weight_bits_in, in.k, 2);
  BinaryLinear args;
  args.dtype = in.dtype;
  args.x = in.values;
  args.x_bits = in.bits;
  args.m = in.m;
  args.n = weight_bits.shape(0);
  args.k = in.k;
  const py::array weight_scale = expect_vector<float>("weight_scale", weight_scale_in, args.n);
  const py::array bias = bias_in ? expect_vector<float>("bias", *bias_in, args.n) : py::array();
  py::array y = empty(in.bits == nullptr ? in.x.dtype() : py::dtype::of<float>(), in.sizes(args.n));
  args.y = y.mutable_data();
  args.weight_bits = const_data<uint64_t>(weight_bits);
  args.weight_scale = const_data<float>(weight_scale);
  args.bias = bias_in ? const_data<float>(bias) : nullptr;
  run([&] { return binary_linear(args, default_executor()); });
  return y;
}

py::array binary_threshold_array(const py::array& x, const py::array& weight_bits_in, const py::array& threshold_in,
                                 OptionalInt k) {
  const BinaryInput in = parse_input(x, k);
  const py::array weight_bits = expect_bits("weight_bits", weight_bits_in, in.k, 2);
  BinaryThreshold args;
  args.dtype = in.dtype;
  args.x = in.values;
  args.x_bits = in.bits;
  args.m = in.m;
  args.n = weight_bits.shape(0);
  args.k = in.k;
  const py::array threshold = expect_vector<int32_t>("threshold", threshold_in, args.n);
  py::array y_bits = empty(py::dtype::of<int64_t>(), in.sizes(binary_words(args.n)));
  args.y_bits = data<uint64_t>(y_bits);
  args.weight_bits = const_data<uint64_t>(weight_bits);
  args.threshold = const_data<int32_t>(threshold);
  run([&] { return binary_threshold(args, default_executor()); });
  return y_bits;
}

// x channels last; weight_bits [n, kernel height, kernel width, words].
py::array binary_conv2d_array(const py::array& x, const py::array& weight_bits_in, const py::array& weight_scale_in,
                              const OptionalArray& bias_in, const Pair& stride, const Pair& padding,
                              const Pair& dilation) {
  if (x.ndim() != 4) invalid("x: expected 4 axes, got " + std::to_string(x.ndim()));
  const py::array weight_bits = expect_bits("weight_bits", weight_bits_in, x.shape(3), 4);
  const Images images = parse_images(x, {weight_bits.shape(1), weight_bits.shape(2)}, stride, padding, dilation);
  BinaryConv2d args;
  args.shape = images.shape;
  args.layer.dtype = images.dtype;
  args.layer.x = images.x.data();
  args.layer.n = weight_bits.shape(0);
  args.layer.weight_bits = const_data<uint64_t>(weight_bits);
  const py::array weight_scale = expect_vector<float>("weight_scale", weight_scale_in, args.layer.n);
  const py::array bias = bias_in ? expect_vector<float>("bias", *bias_in, args.layer.n) : py::array();
  py::array y = images.result(args.layer.n);
  args.layer.y = y.mutable_data();
  args.layer.weight_scale = const_data<float>(weight_scale);
  args.layer.bias = bias_in ? const_data<float>(bias) : nullptr;
  if (y.size() > 0) run([&] { return binary_conv2d(args, default_executor()); });
  return y;
}

}  // namespace

void bind_binary(py::module_& m) {
  const py::arg x("x");
  const py::arg weight_bits("weight_bits");
  const py::arg k("k");
  m.def("pack_signs", &pack_signs_array, x);
  m.def("unpack_signs", &unpack_signs_array, py::arg("bits"), k);
  m.def("binary_matmul", &binary_matmul_array, py::arg("a_bits"), py::arg("b_bits"), k);
  m.def("binary_linear", &binary_linear_array, x, weight_bits, py::arg("weight_scale"), py::arg("bias"), k);
  m.def("binary_conv2d", &binary_conv2d_array, x, weight_bits, py::arg("weight_scale"), py::arg("bias"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"));
  m.def("binary_threshold", &binary_threshold_array, x, weight_bits, py::arg("threshold"), k);
}

}  // namespace kdq::bindings
