// kdq_kernels._C: the kernels on NumPy arrays. kdq_kernels/numpy.py gives these functions their public signatures.
//
// Contiguous input is used in place; results are fresh arrays (or `out`). The GIL is released while a kernel runs on
// the library's own thread pool.
#include <pybind11/stl.h>

#include "introspection.h"
#include "kdq/kdq.h"
#include "numpy_attention.h"
#include "numpy_binary.h"
#include "numpy_bitplanes.h"
#include "numpy_codebook.h"
#include "numpy_common.h"
#include "numpy_distillation.h"
#include "numpy_int8.h"

namespace kdq::bindings {
namespace {

using OptionalArray = std::optional<py::array>;
using OptionalInt = std::optional<int64_t>;

// ---- fake_quant ----------------------------------------------------------------------------------------------------

struct Quantization {
  QuantShape shape;
  QuantGrid grid;
  py::array scale;
  py::array zero_point;  // keeps the buffer that grid points to alive
};

Quantization parse_quantization(const py::array& x, const py::array& scale, const OptionalArray& zero_point,
                                int64_t quant_min, int64_t quant_max, OptionalInt axis, OptionalInt group_size) {
  Quantization q;
  q.scale = expect<float>("scale", scale);
  check(resolve_quant_shape(sizes_of(x), sizes_of(scale), axis, group_size, &q.shape));
  check(narrow_quant_range(quant_min, quant_max, &q.grid));
  q.grid.scale = const_data<float>(q.scale);
  if (!zero_point) return q;
  if (has_dtype<float>(*zero_point)) {
    q.grid.zero_point_kind = ZeroPointKind::kFloat32;
    q.zero_point = dense(*zero_point);
  } else {
    q.grid.zero_point_kind = ZeroPointKind::kInt32;
    q.zero_point = expect<int32_t>("zero_point", *zero_point);
  }
  if (q.zero_point.size() != q.scale.size()) {
    invalid("zero_point: expected the shape of scale " + to_string(sizes_of(scale)) + ", got " +
            to_string(sizes_of(*zero_point)));
  }
  q.grid.zero_point = q.zero_point.data();
  return q;
}

py::array checked_out(const OptionalArray& out, const py::array& x) {
  if (!out) return empty(x.dtype(), sizes_of(x));
  if (!out->dtype().equal(x.dtype()) || sizes_of(*out) != sizes_of(x)) {
    invalid("out: expected dtype " + dtype_name(x) + " and shape " + to_string(sizes_of(x)) + ", got " +
            dtype_name(*out) + " " + to_string(sizes_of(*out)));
  }
  if ((out->flags() & py::array::c_style) == 0 || !out->writeable())
    invalid("out: expected a writeable C-contiguous array");
  if (overlap_partly(x.data(), out->data(), static_cast<size_t>(x.nbytes()))) {
    invalid("out: expected x itself, or memory of its own, got an array that shares a part of x");
  }
  return *out;
}

py::array fake_quantize_array(const py::array& x_in, const py::array& scale, const OptionalArray& zero_point,
                              int64_t quant_min, int64_t quant_max, OptionalInt axis, OptionalInt group_size,
                              const OptionalArray& out) {
  const DType dtype = float_dtype("x", x_in);
  const Quantization q = parse_quantization(x_in, scale, zero_point, quant_min, quant_max, axis, group_size);
  const py::array x = dense(x_in);
  py::array y = checked_out(out, x);
  void* y_data = y.mutable_data();
  run([&, x_data = x.data()] { return fake_quantize(dtype, x_data, y_data, q.shape, q.grid, default_executor()); });
  return y;
}

py::tuple fake_quantize_backward_array(const py::array& grad_in, const py::array& x_in, const py::array& scale,
                                       const OptionalArray& zero_point, int64_t quant_min, int64_t quant_max,
                                       OptionalInt axis, OptionalInt group_size) {
  const DType dtype = float_dtype("x", x_in);
  if (!grad_in.dtype().equal(x_in.dtype()) || sizes_of(grad_in) != sizes_of(x_in)) {
    invalid("grad: expected dtype and shape of x, " + dtype_name(x_in) + " " + to_string(sizes_of(x_in)) + ", got " +
            dtype_name(grad_in) + " " + to_string(sizes_of(grad_in)));
  }
  const Quantization q = parse_quantization(x_in, scale, zero_point, quant_min, quant_max, axis, group_size);
  const py::array x = dense(x_in);
  const py::array grad = dense(grad_in);
  py::array grad_x = empty(x.dtype(), sizes_of(x));
  py::array grad_scale = empty(py::dtype::of<float>(), sizes_of(scale));
  py::array grad_zero_point = empty(py::dtype::of<float>(), sizes_of(scale));
  void* grad_x_data = grad_x.mutable_data();
  float* grad_scale_data = data<float>(grad_scale);
  float* grad_zero_point_data = data<float>(grad_zero_point);
  run([&, x_data = x.data(), grad_data = grad.data()] {
    return fake_quantize_backward(dtype, grad_data, x_data, grad_x_data, grad_scale_data, grad_zero_point_data, q.shape,
                                  q.grid, default_executor());
  });
  return py::make_tuple(grad_x, grad_scale, grad_zero_point);
}

py::dtype numpy_dtype(QType qtype) {
  switch (qtype) {
    case QType::kInt8:
      return py::dtype::of<int8_t>();
    case QType::kUInt8:
      return py::dtype::of<uint8_t>();
    case QType::kInt32:
      return py::dtype::of<int32_t>();
  }
  throw std::logic_error("unknown QType");
}

QType int_dtype(const char* name, const py::array& a) {
  if (has_dtype<int8_t>(a)) return QType::kInt8;
  if (has_dtype<uint8_t>(a)) return QType::kUInt8;
  if (has_dtype<int32_t>(a)) return QType::kInt32;
  invalid(std::string(name) + ": expected dtype int8, uint8 or int32, got " + dtype_name(a));
}

py::array quantize_array(const py::array& x_in, const py::array& scale, const OptionalArray& zero_point,
                         int64_t quant_min, int64_t quant_max, OptionalInt axis, OptionalInt group_size) {
  const DType dtype = float_dtype("x", x_in);
  const Quantization q = parse_quantization(x_in, scale, zero_point, quant_min, quant_max, axis, group_size);
  const QType qtype = smallest_qtype(quant_min, quant_max);
  const py::array x = dense(x_in);
  py::array y = empty(numpy_dtype(qtype), sizes_of(x));
  void* y_data = y.mutable_data();
  run([&, x_data = x.data()] { return quantize(dtype, x_data, qtype, y_data, q.shape, q.grid, default_executor()); });
  return y;
}

py::array dequantize_array(const py::array& q_in, const py::array& scale, const OptionalArray& zero_point,
                           OptionalInt axis, OptionalInt group_size) {
  const QType qtype = int_dtype("q", q_in);
  const Quantization q = parse_quantization(q_in, scale, zero_point, kQuantMinLimit, kQuantMaxLimit, axis, group_size);
  const py::array ints = dense(q_in);
  py::array y = empty(py::dtype::of<float>(), sizes_of(ints));
  float* y_data = data<float>(y);
  run([&, q_data = ints.data()] { return dequantize(qtype, q_data, y_data, q.shape, q.grid, default_executor()); });
  return y;
}

py::tuple quantize_rows_array(const py::array& x_in) {
  const DType dtype = float_dtype("x", x_in);
  const int64_t rows = rows_of("x", x_in);
  const py::array x = dense(x_in);
  Sizes sizes = sizes_of(x);
  py::array q = empty(py::dtype::of<int8_t>(), sizes);
  const int64_t cols = sizes.back();
  sizes.pop_back();
  py::array scale = empty(py::dtype::of<float>(), sizes);
  int8_t* q_data = data<int8_t>(q);
  float* scale_data = data<float>(scale);
  run([&, x_data = x.data()] {
    return quantize_rows(dtype, x_data, rows, cols, q_data, scale_data, default_executor());
  });
  return py::make_tuple(q, scale);
}

py::array fake_quantize_rows_array(const py::array& x_in) {
  const DType dtype = float_dtype("x", x_in);
  const int64_t rows = rows_of("x", x_in);
  const py::array x = dense(x_in);
  py::array y = empty(x.dtype(), sizes_of(x));
  void* y_data = y.mutable_data();
  const int64_t cols = sizes_of(x).back();
  run([&, x_data = x.data()] { return fake_quantize_rows(dtype, x_data, rows, cols, y_data, default_executor()); });
  return y;
}

py::tuple binarize_rows_array(const py::array& x_in) {
  const DType dtype = float_dtype("x", x_in);
  const int64_t rows = rows_of("x", x_in);
  const py::array x = dense(x_in);
  Sizes sizes = sizes_of(x);
  py::array signs = empty(x.dtype(), sizes);
  const int64_t cols = sizes.back();
  sizes.pop_back();
  py::array mean = empty(py::dtype::of<float>(), sizes);
  void* signs_data = signs.mutable_data();
  float* mean_data = data<float>(mean);
  run([&, x_data = x.data()] {
    return binarize_rows(dtype, x_data, rows, cols, signs_data, mean_data, default_executor());
  });
  return py::make_tuple(signs, mean);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of kdq_kernels: kernels on NumPy arrays, CPU and build introspection.";
  bind_introspection(m);
  bind_attention(m);
  bind_binary(m);
  bind_bitplanes(m);
  bind_distillation(m);
  bind_codebook(m);
  bind_int8(m);
  const py::arg x("x");
  const py::arg scale("scale");
  const py::arg zero_point("zero_point");
  const py::arg quant_min("quant_min");
  const py::arg quant_max("quant_max");
  const py::arg axis("axis");
  const py::arg group_size("group_size");
  m.def("fake_quantize", &fake_quantize_array, x, scale, zero_point, quant_min, quant_max, axis, group_size,
        py::arg("out"));
  m.def("fake_quantize_backward", &fake_quantize_backward_array, py::arg("grad"), x, scale, zero_point, quant_min,
        quant_max, axis, group_size);
  m.def("quantize", &quantize_array, x, scale, zero_point, quant_min, quant_max, axis, group_size);
  m.def("dequantize", &dequantize_array, py::arg("q"), scale, zero_point, axis, group_size);
  m.def("quantize_rows", &quantize_rows_array, x);
  m.def("fake_quantize_rows", &fake_quantize_rows_array, x);
  m.def("binarize_rows", &binarize_rows_array, x);
  m.def(
      "int8_packed_bytes",
      [](int64_t n, int64_t k, int bits) {
        size_t bytes = 0;
        check(int8_packed_bytes(n, k, &bytes, bits));
        return bytes;
      },
      py::arg("n"), py::arg("k"), py::arg("bits"));
}

}  // namespace kdq::bindings
