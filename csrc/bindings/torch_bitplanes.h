// torch.ops.kdq: bit planes, int64 as all bits. A member of the class on which operators are templates, beside those of
// all: plane_linear(call).
#pragma once

#include "kdq/bitplanes.h"
#include "layer_args.h"
#include "torch_binary.h"
#include "torch_static_input.h"

namespace kdq::bindings {

// Planes of shape [bits, ..., binary_words(k)].
template <class On>
Tensor expect_planes(const On& on, const char* name, const Tensor& t, int64_t k, int64_t ndim = -1) {
  const Tensor planes = expect_bits(on, name, t, k, ndim);
  if (planes.dim() < 2) {
    invalid(std::string(name) + ": expected shape [bits, ..., words], got " + to_string(sizes_of(t)));
  }
  return planes;
}

inline PlaneForm plane_form(const char* argument, const std::string& name) {
  PlaneForm form = PlaneForm::kUnsigned;
  check(plane_form_from_name(argument, name, &form));
  return form;
}

// A matrix of planes [bits, rows, words], with its tensor.
struct Planes {
  Tensor tensor;
  PlaneMatrix matrix;
};

template <class On>
Planes parse_planes(const On& on, const char* name, const Tensor& t, int64_t k, PlaneForm form) {
  Planes p{expect_planes(on, name, t, k, 3), {}};
  check(check_plane_count(name, p.tensor.size(0), form));
  p.matrix = {data<uint64_t>(p.tensor), p.tensor.size(1), static_cast<int>(p.tensor.size(0)), form};
  return p;
}

template <class On>
Tensor pack_bitplanes_op(const Tensor& q_in, int64_t bits, const std::string& form_name) {
  const On on("q", q_in);
  const PlaneForm form = plane_form("form", form_name);
  const Tensor q = expect(on, "q", q_in, form == PlaneForm::kUnsigned ? ScalarType::Byte : ScalarType::Char);
  const int64_t rows = rows_of("q", q);
  check(check_plane_count("bits", bits, form));
  Sizes sizes = sizes_of(q);
  const int64_t k = sizes.back();
  sizes.back() = binary_words(k);
  sizes.insert(sizes.begin(), bits);
  const Tensor planes = empty(on, sizes, ScalarType::Long);
  check(on.pack_bitplanes(q.const_data_ptr(), rows, k, static_cast<int>(bits), form, mutable_data<uint64_t>(planes)));
  return planes;
}

template <class On>
Tensor unpack_bitplanes_op(const Tensor& planes_in, int64_t k, const std::string& form_name) {
  const On on("planes", planes_in);
  const PlaneForm form = plane_form("form", form_name);
  const Tensor planes = expect_planes(on, "planes", planes_in, k);
  Sizes sizes = sizes_of(planes);
  const int64_t bits = sizes.front();
  check(check_plane_count("planes", bits, form));
  sizes.erase(sizes.begin());
  const int64_t rows = product(sizes, 0, sizes.size() - 1);
  sizes.back() = k;
  const Tensor q = empty(on, sizes, form == PlaneForm::kUnsigned ? ScalarType::Byte : ScalarType::Char);
  check(on.unpack_bitplanes(data<uint64_t>(planes), rows, k, static_cast<int>(bits), form, q.mutable_data_ptr()));
  return q;
}

template <class On>
Tensor bitplane_matmul_op(const Tensor& a_in, const Tensor& b_in, int64_t k, const std::string& a_form,
                          const std::string& b_form) {
  const On on("a_planes", a_in);
  const Planes a = parse_planes(on, "a_planes", a_in, k, plane_form("a_form", a_form));
  const Planes b = parse_planes(on, "b_planes", b_in, k, plane_form("b_form", b_form));
  const Tensor out = empty(on, {a.matrix.rows, b.matrix.rows}, ScalarType::Int);
  check(on.bitplane_matmul(a.matrix, b.matrix, k, mutable_data<int32_t>(out)));
  return out;
}

// weight_planes [bits, n, words].
template <class On>
Tensor bitplane_linear_op(const Tensor& x_in, const Tensor& weight_planes, const Tensor& weight_sum_in,
                          const Tensor& weight_scale_in, const OptionalTensor& bias_in, const Tensor& input_scale,
                          const OptionalTensor& input_zero_point, int64_t input_quant_max,
                          const std::string& weight_form, const std::optional<std::string>& activation) {
  const On on("x", x_in);
  LayerCall call;
  const Int8Linear& grid = call.args;
  BitplaneLinear args;
  args.dtype = float_dtype("x", x_in);
  args.m = rows_of("x", x_in);
  const Tensor x = expect_here(on, "x", x_in);
  Sizes sizes = sizes_of(x);
  args.k = sizes.back();
  const Planes weight =
      parse_planes(on, "weight_planes", weight_planes, args.k, plane_form("weight_form", weight_form));
  const int64_t n = weight.matrix.rows;
  const Tensor weight_sum = expect_vector(on, "weight_sum", weight_sum_in, n, ScalarType::Int);
  const Tensor weight_scale = expect_vector(on, "weight_scale", weight_scale_in, n);
  OptionalTensor bias;
  if (bias_in) bias = expect_vector(on, "bias", *bias_in, n);
  check(activation_from_name(activation, &args.activation));
  on.static_input(input_scale, input_zero_point, input_quant_max, &call);
  sizes.back() = n;
  const Tensor y = empty(on, sizes, x.scalar_type());
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.weight = weight.matrix;
  args.weight_sum = data<int32_t>(weight_sum);
  args.weight_scale = data<float>(weight_scale);
  args.bias = bias ? data<float>(*bias) : nullptr;
  args.input_scale = grid.input_scale;
  args.input_zero_point = grid.input_zero_point;
  args.input_quant_max = grid.input_quant_max;
  check(on.plane_linear(args, call));
  return y;
}

template <class On>
void register_bitplanes(torch::stable::detail::StableLibrary& m) {
  m.impl("pack_bitplanes", Operator<&pack_bitplanes_op<On>>::run);
  m.impl("unpack_bitplanes", Operator<&unpack_bitplanes_op<On>>::run);
  m.impl("bitplane_matmul", Operator<&bitplane_matmul_op<On>>::run);
  m.impl("bitplane_linear", Operator<&bitplane_linear_op<On>>::run);
}

}  // namespace kdq::bindings
