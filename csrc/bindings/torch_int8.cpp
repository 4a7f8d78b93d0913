// torch.ops.kdq: the int8 family on CPU tensors.
#include "kdq/int8_gemm.h"

#include "layer_args.h"
#include "torch_ops.h"

namespace kdq::bindings {
namespace {

struct Packed {
  Tensor blob;
  PackedShape shape;

  const void* data() const { return blob.const_data_ptr(); }
  size_t bytes() const { return static_cast<size_t>(blob.numel()); }
};

Packed parse_packed(const char* name, const Tensor& packed) {
  Packed p{expect(name, packed, ScalarType::Byte, 2), {}};
  check(packed_array_shape(p.blob.const_data_ptr(), p.blob.size(0), p.blob.size(1), &p.shape));
  return p;
}

// A tensor of one element, on the CPU.
template <class T>
T scalar(const char* name, const Tensor& t, ScalarType type) {
  const Tensor value = expect(name, t, type);
  if (value.numel() != 1) {
    invalid(std::string(name) + ": expected one element, got shape " + to_string(sizes_of(t)));
  }
  return *data<T>(value);
}

int64_t integer_scalar(const char* name, const Tensor& t) {
  if (t.scalar_type() == ScalarType::Long) return scalar<int64_t>(name, t, ScalarType::Long);
  return scalar<int32_t>(name, t, ScalarType::Int);
}

// Runs one of the two linear layers: `fill` sets what only one of them has.
template <class Layer, class Fill>
Tensor run_linear(const Tensor& x_in, const Tensor& packed, const Tensor& weight_scale_in,
                  const OptionalTensor& bias_in, const std::optional<std::string>& activation, Layer layer, Fill fill) {
  Int8Linear args;
  args.dtype = float_dtype("x", x_in);
  args.m = rows_of("x", x_in);
  const Tensor x = expect_cpu("x", x_in);
  const Packed p = parse_packed("packed", packed);
  const Tensor weight_scale = expect_vector("weight_scale", weight_scale_in, p.shape.n);
  OptionalTensor bias;
  if (bias_in) bias = expect_vector("bias", *bias_in, p.shape.n);
  Sizes sizes = sizes_of(x);
  args.k = sizes.back();
  check(check_same_k("x", args.k, p.shape));
  check(activation_from_name(activation, &args.activation));
  fill(&args);
  sizes.back() = p.shape.n;
  const Tensor y = empty(sizes, x.scalar_type());
  if (p.shape.n == 0) return y;
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.packed = p.data();
  args.packed_bytes = p.bytes();
  args.weight_scale = data<float>(weight_scale);
  args.bias = bias ? data<float>(*bias) : nullptr;
  check(layer(args, torch_executor()));
  return y;
}

}  // namespace

Tensor pack_int8_weight_op(const Tensor& w_in) {
  const Tensor w = expect("w", w_in, ScalarType::Char, 2);
  Sizes sizes;
  check(packed_tensor_sizes(w.size(0), w.size(1), &sizes));
  const Tensor packed = empty(sizes, ScalarType::Byte);
  if (w.size(0) > 0) {
    check(pack_int8_weight(data<int8_t>(w), w.size(0), w.size(1), packed.mutable_data_ptr(),
                           static_cast<size_t>(packed.numel()), torch_executor()));
  }
  return packed;
}

Tensor unpack_int8_weight_op(const Tensor& packed) {
  const Packed p = parse_packed("packed", packed);
  const Tensor w = empty({p.shape.n, p.shape.k}, ScalarType::Char);
  if (p.shape.n > 0) check(unpack_int8_weight(p.data(), p.bytes(), mutable_data<int8_t>(w), torch_executor()));
  return w;
}

Tensor int8_matmul_op(const Tensor& a_in, const Tensor& b) {
  const Tensor a = expect("a", a_in, ScalarType::Char, 2);
  const Packed p = parse_packed("b", b.scalar_type() == ScalarType::Char ? pack_int8_weight_op(b) : b);
  check(check_same_k("a", a.size(1), p.shape));
  const Tensor out = empty({a.size(0), p.shape.n}, ScalarType::Int);
  if (p.shape.n > 0) {
    check(int8_matmul(data<int8_t>(a), a.size(0), a.size(1), p.data(), p.bytes(), mutable_data<int32_t>(out),
                      torch_executor()));
  }
  return out;
}

Tensor int8_linear_op(const Tensor& x, const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias,
                      const OptionalTensor& input_scale, const OptionalTensor& input_zero_point,
                      int64_t input_quant_max, const std::optional<std::string>& activation) {
  return run_linear(x, packed, weight_scale, bias, activation, int8_linear, [&](Int8Linear* args) {
    std::optional<float> step;
    std::optional<int64_t> zero_point;
    if (input_scale) step = scalar<float>("input_scale", *input_scale, ScalarType::Float);
    if (input_zero_point) zero_point = integer_scalar("input_zero_point", *input_zero_point);
    check(set_static_input(step, zero_point, input_quant_max, args));
  });
}

Tensor int8_weight_only_linear_op(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                                  const OptionalTensor& bias, const std::optional<std::string>& activation) {
  return run_linear(x, packed, weight_scale, bias, activation, int8_weight_only_linear, [](Int8Linear*) {});
}

}  // namespace kdq::bindings
