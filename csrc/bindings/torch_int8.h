// torch.ops.kdq: the int8 family. What a packed weight is depends on the device, so that the class on which operators
// are templates has these members too:
//   pack(w, bits), unpack(packed)
//   open(name, packed), and open_factor(name, b) for a weight that may also be plain int8
//   static_input(scale, zero_point, quant_max, &call): takes the numbers of static activations
//   multiply(a, packed, out), linear(call), weight_only(call)
//   convolution(shape, call)
#pragma once

#include "kdq/int8_gemm.h"
#include "layer_args.h"
#include "torch_common.h"
#include "torch_images.h"
#include "torch_static_input.h"

namespace kdq::bindings {

// A checked packed weight.
struct Packed {
  Tensor blob;
  PackedShape shape;

  const void* data() const { return blob.const_data_ptr(); }
  size_t bytes() const { return static_cast<size_t>(blob.numel()); }
};

// A call of one of the two linear layers.
struct LinearCall : LayerCall {
  Packed packed;
};

// Runs one of the two linear layers: `fill` sets what only one of them has.
template <class On, class Layer, class Fill>
Tensor linear_layer(const On& on, const Tensor& x_in, const Tensor& packed, const Tensor& weight_scale_in,
                    const OptionalTensor& bias_in, const std::optional<std::string>& activation, Layer layer,
                    Fill fill) {
  Int8Linear args;
  args.dtype = float_dtype("x", x_in);
  args.m = rows_of("x", x_in);
  const Tensor x = expect_here(on, "x", x_in);
  LinearCall call{{args, {}, {}}, on.open("packed", packed)};
  const int64_t n = call.packed.shape.n;
  const Tensor weight_scale = expect_vector(on, "weight_scale", weight_scale_in, n);
  OptionalTensor bias;
  if (bias_in) bias = expect_vector(on, "bias", *bias_in, n);
  Sizes sizes = sizes_of(x);
  call.args.k = sizes.back();
  check(check_same_k("x", call.args.k, call.packed.shape));
  check(activation_from_name(activation, &call.args.activation));
  fill(&call);
  sizes.back() = n;
  const Tensor y = empty(on, sizes, x.scalar_type());
  if (n == 0) return y;
  call.args.x = x.const_data_ptr();
  call.args.y = y.mutable_data_ptr();
  call.args.packed = call.packed.data();
  call.args.packed_bytes = call.packed.bytes();
  call.args.weight_scale = data<float>(weight_scale);
  call.args.bias = bias ? data<float>(*bias) : nullptr;
  check(layer(call));
  return y;
}

template <class On>
Tensor pack_int8_weight_op(const Tensor& w_in, int64_t bits) {
  const On on("w", w_in);
  if (bits != 8 && bits != 4 && bits != 2) invalid("bits: expected 8, 4 or 2, got " + std::to_string(bits));
  return on.pack(expect(on, "w", w_in, ScalarType::Char, 2), static_cast<int>(bits));
}

template <class On>
Tensor unpack_int8_weight_op(const Tensor& packed) {
  const On on("packed", packed);
  return on.unpack(on.open("packed", packed));
}

template <class On>
Tensor int8_matmul_op(const Tensor& a_in, const Tensor& b) {
  const On on("a", a_in);
  const Tensor a = expect(on, "a", a_in, ScalarType::Char, 2);
  const Packed packed = on.open_factor("b", b);
  check(check_same_k("a", a.size(1), packed.shape));
  const Tensor out = empty(on, {a.size(0), packed.shape.n}, ScalarType::Int);
  if (packed.shape.n > 0) check(on.multiply(a, packed, out));
  return out;
}

template <class On>
Tensor int8_linear_op(const Tensor& x, const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias,
                      const OptionalTensor& input_scale, const OptionalTensor& input_zero_point,
                      int64_t input_quant_max, const std::optional<std::string>& activation) {
  const On on("x", x);
  return linear_layer(
      on, x, packed, weight_scale, bias, activation, [&](const LinearCall& call) { return on.linear(call); },
      [&](LinearCall* call) { on.static_input(input_scale, input_zero_point, input_quant_max, call); });
}

// Layers one after the other: what a call costs beside its kernel is paid once. The last four lists may be empty, as
// each element that is passed costs 100 ns.
template <class On>
Tensor int8_linear_chain_op(const Tensor& x, const std::vector<Tensor>& packed, const std::vector<Tensor>& weight_scale,
                            const std::vector<OptionalTensor>& bias, const std::vector<OptionalTensor>& input_scale,
                            const std::vector<OptionalTensor>& input_zero_point,
                            const std::vector<int64_t>& input_quant_max, const std::vector<std::string>& activation) {
  const size_t layers = packed.size();
  if (layers == 0) invalid("packed: expected the weights of at least one layer, got none");
  const auto check_count = [&](const char* name, size_t count, bool may_be_empty) {
    if (count == layers || (may_be_empty && count == 0)) return;
    invalid(std::string(name) + ": expected one for each of " + std::to_string(layers) + " layers, got " +
            std::to_string(count));
  };
  check_count("weight_scale", weight_scale.size(), false);
  check_count("bias", bias.size(), false);
  check_count("input_scale", input_scale.size(), true);
  check_count("input_zero_point", input_zero_point.size(), true);
  check_count("input_quant_max", input_quant_max.size(), true);
  check_count("activation", activation.size(), true);
  Tensor y = x;
  for (size_t i = 0; i < layers; ++i) {
    const bool is_active = !activation.empty() && !activation[i].empty();
    y = int8_linear_op<On>(y, packed[i], weight_scale[i], bias[i], input_scale.empty() ? std::nullopt : input_scale[i],
                           input_zero_point.empty() ? std::nullopt : input_zero_point[i],
                           input_quant_max.empty() ? 255 : input_quant_max[i],
                           is_active ? std::optional<std::string>(activation[i]) : std::nullopt);
  }
  return y;
}

template <class On>
Tensor int8_weight_only_linear_op(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                                  const OptionalTensor& bias, const std::optional<std::string>& activation) {
  const On on("x", x);
  return linear_layer(
      on, x, packed, weight_scale, bias, activation, [&](const LinearCall& call) { return on.weight_only(call); },
      [](LinearCall*) {});
}

// packed: of the weight [n, channels, height, width] as [n, height * width * channels], channels last.
template <class On>
Tensor int8_conv2d_op(const Tensor& x, const Tensor& packed, const Tensor& weight_scale_in,
                      const OptionalTensor& bias_in, const Pair& kernel_size, const Pair& stride, const Pair& padding,
                      const Pair& dilation, const OptionalTensor& input_scale, const OptionalTensor& input_zero_point,
                      int64_t input_quant_max, const std::optional<std::string>& activation) {
  const On on("x", x);
  check_pair("kernel_size", kernel_size);
  const Images images = parse_images(on, x, kernel_size[0], kernel_size[1], {stride, padding, dilation});
  LinearCall call{{}, on.open("packed", packed)};
  Int8Linear& layer = call.args;
  const int64_t n = call.packed.shape.n;
  const Tensor weight_scale = expect_vector(on, "weight_scale", weight_scale_in, n);
  OptionalTensor bias;
  if (bias_in) bias = expect_vector(on, "bias", *bias_in, n);
  layer.dtype = images.dtype;
  layer.k = kernel_size[0] * kernel_size[1] * images.shape.channels;
  check(check_same_k("x", layer.k, call.packed.shape));
  check(activation_from_name(activation, &layer.activation));
  on.static_input(input_scale, input_zero_point, input_quant_max, &call);
  layer.x = images.x.const_data_ptr();
  layer.packed = call.packed.data();
  layer.packed_bytes = call.packed.bytes();
  layer.weight_scale = data<float>(weight_scale);
  layer.bias = bias ? data<float>(*bias) : nullptr;
  return convolve(on, images, n, [&](void* y) {
    layer.y = y;
    return on.convolution(images.shape, call);
  });
}

template <class On>
void register_int8(torch::stable::detail::StableLibrary& m) {
  m.impl("pack_int8_weight", Operator<&pack_int8_weight_op<On>>::run);
  m.impl("unpack_int8_weight", Operator<&unpack_int8_weight_op<On>>::run);
  m.impl("int8_matmul", Operator<&int8_matmul_op<On>>::run);
  m.impl("int8_linear", Operator<&int8_linear_op<On>>::run);
  m.impl("int8_linear_chain", Operator<&int8_linear_chain_op<On>>::run);
  m.impl("int8_weight_only_linear", Operator<&int8_weight_only_linear_op<On>>::run);
  m.impl("int8_conv2d", Operator<&int8_conv2d_op<On>>::run);
}

}  // namespace kdq::bindings
