// torch.ops.kdq: fake_quantize and its relatives.
//
// A tensor whose elements fill their memory without gaps (channels_last, transposed, ...) is processed in memory order
// and the result has the same strides; any other (expanded, sliced) is made contiguous first.
#pragma once

#include <algorithm>
#include <numeric>

#include "torch_common.h"

namespace kdq::bindings {

// The order of the axes in memory, slowest first; empty when the tensor has gaps or overlaps.
inline Sizes memory_order(const Tensor& t) {
  Sizes order(static_cast<size_t>(t.dim()));
  std::iota(order.begin(), order.end(), 0);
  if (t.is_contiguous()) return order;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return t.stride(a) > t.stride(b); });
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    if (t.size(order[i]) == 1) continue;
    if (t.stride(order[i]) != expected) return {};
    expected *= t.size(order[i]);
  }
  return order;
}

// x as the core wants it.
struct QuantInput {
  Tensor x;  // dense in memory
  QuantShape shape;
};

inline QuantInput parse_quant_input(const Tensor& x, const Tensor& scale, OptionalInt axis, OptionalInt group_size) {
  QuantInput input{x, {}};
  const Sizes sizes = sizes_of(x);
  const Sizes scale_sizes = sizes_of(scale);
  check(resolve_quant_shape(sizes, scale_sizes, axis, group_size, &input.shape));
  if (x.is_contiguous()) return input;
  const Sizes order = group_size ? Sizes() : memory_order(x);
  if (order.empty()) {
    input.x = contiguous(x);
    return input;
  }
  if (axis) {
    const int64_t logical = *axis < 0 ? *axis + x.dim() : *axis;
    Sizes in_memory;
    for (int64_t a : order) in_memory.push_back(sizes[static_cast<size_t>(a)]);
    const int64_t position = std::find(order.begin(), order.end(), logical) - order.begin();
    check(resolve_quant_shape(in_memory, scale_sizes, position, std::nullopt, &input.shape));
  }
  return input;
}

// The grid, and the tensors that its pointers point into.
struct Grid {
  QuantGrid grid;
  Tensor scale;
  Tensor zero_point;
};

template <class On>
Grid parse_grid(const On& on, const Tensor& scale, const OptionalTensor& zero_point, int64_t quant_min,
                int64_t quant_max) {
  Grid g;
  g.scale = expect(on, "scale", scale, ScalarType::Float);
  check(narrow_quant_range(quant_min, quant_max, &g.grid));
  g.grid.scale = data<float>(g.scale);
  if (!zero_point) return g;
  const bool learned = zero_point->scalar_type() == ScalarType::Float;
  if (!learned && zero_point->scalar_type() != ScalarType::Int) {
    invalid("zero_point: expected dtype int32 or float32, got " + type_name(zero_point->scalar_type()));
  }
  if (sizes_of(*zero_point) != sizes_of(scale)) {
    invalid("zero_point: expected the shape of scale " + to_string(sizes_of(scale)) + ", got " +
            to_string(sizes_of(*zero_point)));
  }
  g.zero_point = expect(on, "zero_point", *zero_point, learned ? ScalarType::Float : ScalarType::Int);
  g.grid.zero_point_kind = learned ? ZeroPointKind::kFloat32 : ZeroPointKind::kInt32;
  g.grid.zero_point = g.zero_point.const_data_ptr();
  return g;
}

// Uninitialised, with the strides of a dense tensor.
template <class On>
Tensor empty_like(const On& on, const Tensor& t, ScalarType type) {
  return on.empty_strided(sizes_of(t), {t.strides(), t.strides() + t.dim()}, type);
}

inline ScalarType scalar_type(QType qtype) {
  switch (qtype) {
    case QType::kInt8:
      return ScalarType::Char;
    case QType::kUInt8:
      return ScalarType::Byte;
    case QType::kInt32:
      return ScalarType::Int;
  }
  throw std::logic_error("unknown QType");
}

inline QType integer_type(const char* name, const Tensor& t) {
  for (QType qtype : {QType::kInt8, QType::kUInt8, QType::kInt32}) {
    if (scalar_type(qtype) == t.scalar_type()) return qtype;
  }
  invalid(std::string(name) + ": expected dtype int8, uint8 or int32, got " + type_name(t.scalar_type()));
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

template <class On>
void check_gradient(const On& on, const Tensor& grad, const Tensor& x) {
  if (!on.has(x)) invalid("x: expected " + on.kind());
  if (grad.scalar_type() == x.scalar_type() && sizes_of(grad) == sizes_of(x)) return;
  invalid("grad: expected dtype and shape of x, " + type_name(x.scalar_type()) + " " + to_string(sizes_of(x)) +
          ", got " + type_name(grad.scalar_type()) + " " + to_string(sizes_of(grad)));
}

// A gradient that becomes that of x in its own memory.
template <class On>
void check_inplace_gradient(const On& on, const Tensor& grad, const Tensor& x) {
  check_gradient(on, grad, x);
  if (!grad.is_contiguous()) invalid("grad: expected a contiguous tensor, since it is changed in place");
}

template <class On>
Tensor fake_quantize_op(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point, int64_t quant_min,
                        int64_t quant_max, OptionalInt axis, OptionalInt group_size) {
  const On on("x", x);
  const DType dtype = float_dtype("x", x);
  const Grid g = parse_grid(on, scale, zero_point, quant_min, quant_max);
  const QuantInput input = parse_quant_input(x, scale, axis, group_size);
  const Tensor y = empty_like(on, input.x, x.scalar_type());
  check(on.fake_quantize(dtype, input.x.const_data_ptr(), y.mutable_data_ptr(), input.shape, g.grid));
  return y;
}

template <class On>
void fake_quantize_out_op(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point, int64_t quant_min,
                          int64_t quant_max, OptionalInt axis, OptionalInt group_size, const Tensor& out) {
  const On on("x", x);
  const DType dtype = float_dtype("x", x);
  if (!on.has(out)) invalid("out: expected " + on.kind());
  if (out.scalar_type() != x.scalar_type() || sizes_of(out) != sizes_of(x)) {
    invalid("out: expected dtype and shape of x, " + type_name(x.scalar_type()) + " " + to_string(sizes_of(x)) +
            ", got " + type_name(out.scalar_type()) + " " + to_string(sizes_of(out)));
  }
  const Grid g = parse_grid(on, scale, zero_point, quant_min, quant_max);
  const QuantInput input = parse_quant_input(x, scale, axis, group_size);
  for (int64_t i = 0; i < out.dim(); ++i) {
    if (out.size(i) > 1 && out.stride(i) == 0) {
      invalid("out: expected a place in memory for each element, got an expanded tensor of shape " +
              to_string(sizes_of(out)));
    }
  }
  const size_t bytes = static_cast<size_t>(x.numel()) * element_size(x.scalar_type());
  const void* const from = input.x.const_data_ptr();
  if (same_strides(input.x, out) && !overlap_partly(from, out.const_data_ptr(), bytes)) {
    check(on.fake_quantize(dtype, from, out.mutable_data_ptr(), input.shape, g.grid));
    return;
  }
  copy(fake_quantize_op<On>(x, scale, zero_point, quant_min, quant_max, axis, group_size), out);
}

template <class On>
std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward_op(const Tensor& grad_in, const Tensor& x,
                                                             const Tensor& scale, const OptionalTensor& zero_point,
                                                             int64_t quant_min, int64_t quant_max, OptionalInt axis,
                                                             OptionalInt group_size) {
  const On on("grad", grad_in);
  const DType dtype = float_dtype("x", x);
  check_gradient(on, grad_in, x);
  const Grid g = parse_grid(on, scale, zero_point, quant_min, quant_max);
  QuantInput input = parse_quant_input(x, scale, axis, group_size);
  Tensor grad = grad_in;
  if (!same_strides(input.x, grad)) {
    input = parse_quant_input(dense(x), scale, axis, group_size);
    grad = dense(grad);
  }
  const Tensor grad_x = empty_like(on, input.x, x.scalar_type());
  const Tensor grad_scale = empty_like(on, g.scale, ScalarType::Float);
  const Tensor grad_zero_point = empty_like(on, g.scale, ScalarType::Float);
  check(on.fake_quantize_backward(dtype, grad.const_data_ptr(), input.x.const_data_ptr(), grad_x.mutable_data_ptr(),
                                  mutable_data<float>(grad_scale), mutable_data<float>(grad_zero_point), input.shape,
                                  g.grid));
  return {grad_x, grad_scale, grad_zero_point};
}

template <class On>
std::tuple<Tensor, Tensor> fake_quantize_backward_inplace_op(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                             const OptionalTensor& zero_point, int64_t quant_min,
                                                             int64_t quant_max, OptionalInt axis) {
  const On on("grad", grad);
  const DType dtype = float_dtype("x", x);
  check_inplace_gradient(on, grad, x);
  const Grid g = parse_grid(on, scale, zero_point, quant_min, quant_max);
  const QuantInput input = parse_quant_input(dense(x), scale, axis, std::nullopt);
  const Tensor grad_scale = empty_like(on, g.scale, ScalarType::Float);
  const Tensor grad_zero_point = empty_like(on, g.scale, ScalarType::Float);
  check(on.fake_quantize_backward(dtype, grad.const_data_ptr(), input.x.const_data_ptr(), grad.mutable_data_ptr(),
                                  mutable_data<float>(grad_scale), mutable_data<float>(grad_zero_point), input.shape,
                                  g.grid));
  return {grad_scale, grad_zero_point};
}

template <class On>
Tensor quantize_op(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point, int64_t quant_min,
                   int64_t quant_max, OptionalInt axis, OptionalInt group_size) {
  const On on("x", x);
  const DType dtype = float_dtype("x", x);
  const Grid g = parse_grid(on, scale, zero_point, quant_min, quant_max);
  const QuantInput input = parse_quant_input(x, scale, axis, group_size);
  const QType qtype = smallest_qtype(quant_min, quant_max);
  const Tensor q = empty_like(on, input.x, scalar_type(qtype));
  check(on.quantize(dtype, input.x.const_data_ptr(), qtype, q.mutable_data_ptr(), input.shape, g.grid));
  return q;
}

template <class On>
Tensor dequantize_op(const Tensor& q, const Tensor& scale, const OptionalTensor& zero_point, OptionalInt axis,
                     OptionalInt group_size) {
  const On on("q", q);
  const QType qtype = integer_type("q", q);
  const Grid g = parse_grid(on, scale, zero_point, kQuantMinLimit, kQuantMaxLimit);
  const QuantInput input = parse_quant_input(q, scale, axis, group_size);
  const Tensor y = empty_like(on, input.x, ScalarType::Float);
  check(on.dequantize(qtype, input.x.const_data_ptr(), mutable_data<float>(y), input.shape, g.grid));
  return y;
}

template <class On>
std::tuple<Tensor, Tensor> quantize_rows_op(const Tensor& x_in) {
  const On on("x", x_in);
  const DType dtype = float_dtype("x", x_in);
  const int64_t rows = rows_of("x", x_in);
  const Tensor x = dense(x_in);
  Sizes sizes = sizes_of(x);
  const Tensor q = empty(on, sizes, ScalarType::Char);
  const int64_t cols = sizes.back();
  sizes.pop_back();
  const Tensor scale = empty(on, sizes, ScalarType::Float);
  check(on.quantize_rows(dtype, x.const_data_ptr(), rows, cols, mutable_data<int8_t>(q), mutable_data<float>(scale)));
  return {q, scale};
}

template <class On>
Tensor fake_quantize_rows_op(const Tensor& x_in) {
  const On on("x", x_in);
  const DType dtype = float_dtype("x", x_in);
  const int64_t rows = rows_of("x", x_in);
  const Tensor x = dense(x_in);
  const Tensor y = empty(on, sizes_of(x), x.scalar_type());
  check(on.fake_quantize_rows(dtype, x.const_data_ptr(), rows, x.size(x.dim() - 1), y.mutable_data_ptr()));
  return y;
}

template <class On>
std::tuple<Tensor, Tensor> binarize_rows_op(const Tensor& x_in) {
  const On on("x", x_in);
  const DType dtype = float_dtype("x", x_in);
  const int64_t rows = rows_of("x", x_in);
  const Tensor x = dense(x_in);
  Sizes sizes = sizes_of(x);
  const Tensor signs = empty(on, sizes, x.scalar_type());
  const int64_t cols = sizes.back();
  sizes.pop_back();
  const Tensor mean = empty(on, sizes, ScalarType::Float);
  check(on.binarize_rows(dtype, x.const_data_ptr(), rows, cols, signs.mutable_data_ptr(), mutable_data<float>(mean)));
  return {signs, mean};
}

template <class On>
Tensor binarize_rows_backward_op(const OptionalTensor& grad_signs_in, const OptionalTensor& grad_mean_in,
                                 const Tensor& x_in) {
  const On on("x", x_in);
  const DType dtype = float_dtype("x", x_in);
  const int64_t rows = rows_of("x", x_in);
  const Tensor x = dense(x_in);
  OptionalTensor grad_signs;
  if (grad_signs_in) {
    grad_signs = expect(on, "grad_signs", *grad_signs_in, x.scalar_type());
    if (sizes_of(*grad_signs) != sizes_of(x)) invalid("grad_signs: expected the shape of x");
  }
  OptionalTensor grad_mean;
  if (grad_mean_in) {
    grad_mean = expect(on, "grad_mean", *grad_mean_in, ScalarType::Float);
    if (grad_mean->numel() != rows) invalid("grad_mean: expected one element a row of x");
  }
  const Tensor grad_x = empty(on, sizes_of(x), x.scalar_type());
  check(on.binarize_rows_backward(dtype, grad_signs ? grad_signs->const_data_ptr() : nullptr,
                                  grad_mean ? data<float>(*grad_mean) : nullptr, x.const_data_ptr(), rows,
                                  x.size(x.dim() - 1), grad_x.mutable_data_ptr()));
  return grad_x;
}

template <class On>
void binarize_rows_backward_inplace_op(const Tensor& grad, const Tensor& x_in, bool scaled) {
  const On on("grad", grad);
  const DType dtype = float_dtype("x", x_in);
  check_inplace_gradient(on, grad, x_in);
  const int64_t rows = rows_of("x", x_in);
  const Tensor x = dense(x_in);
  const int64_t cols = x.size(x.dim() - 1);
  void* data = grad.mutable_data_ptr();
  check(scaled ? on.scaled_signs_backward(dtype, data, x.const_data_ptr(), rows, cols, data)
               : on.binarize_rows_backward(dtype, data, nullptr, x.const_data_ptr(), rows, cols, data));
}

template <class On>
void register_fake_quant(torch::stable::detail::StableLibrary& m) {
  m.impl("fake_quantize", Operator<&fake_quantize_op<On>>::run);
  m.impl("fake_quantize.out", Operator<&fake_quantize_out_op<On>>::run);
  m.impl("fake_quantize_backward", Operator<&fake_quantize_backward_op<On>>::run);
  m.impl("fake_quantize_backward_", Operator<&fake_quantize_backward_inplace_op<On>>::run);
  m.impl("quantize", Operator<&quantize_op<On>>::run);
  m.impl("dequantize", Operator<&dequantize_op<On>>::run);
  m.impl("quantize_rows", Operator<&quantize_rows_op<On>>::run);
  m.impl("fake_quantize_rows", Operator<&fake_quantize_rows_op<On>>::run);
  m.impl("binarize_rows", Operator<&binarize_rows_op<On>>::run);
  m.impl("binarize_rows_backward", Operator<&binarize_rows_backward_op<On>>::run);
  m.impl("binarize_rows_backward_", Operator<&binarize_rows_backward_inplace_op<On>>::run);
}

}  // namespace kdq::bindings
