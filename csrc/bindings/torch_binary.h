// torch.ops.kdq: the binary family. Bits are int64: torch has no arithmetic on uint64; the words are the same.
#pragma once

#include "kdq/binary_gemm.h"
#include "torch_common.h"
#include "torch_images.h"

namespace kdq::bindings {

// Bits of shape [..., binary_words(k)].
template <class On>
Tensor expect_bits(const On& on, const char* name, const Tensor& t, int64_t k, int64_t ndim = -1) {
  const Tensor bits = expect(on, name, t, ScalarType::Long, ndim);
  if (k < 0) invalid("k: expected at least 0, got " + std::to_string(k));
  if (bits.dim() < 1 || bits.size(bits.dim() - 1) != binary_words(k)) {
    invalid(std::string(name) + ": expected " + std::to_string(binary_words(k)) +
            " words in the last axis for k = " + std::to_string(k) + ", got shape " + to_string(sizes_of(t)));
  }
  return bits;
}

// A layer's input: values, or their signs packed, which are int64 and need k.
struct BinaryInput {
  Tensor x;
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

template <class On>
BinaryInput parse_binary_input(const On& on, const Tensor& x, OptionalInt k) {
  BinaryInput in;
  in.m = rows_of("x", x);
  if (x.scalar_type() == ScalarType::Long) {
    if (!k) invalid("k: expected the number of features, since x holds packed signs (int64)");
    in.k = *k;
    in.x = expect_bits(on, "x", x, in.k);
    in.bits = data<uint64_t>(in.x);
    return in;
  }
  in.dtype = float_dtype("x", x);
  in.x = expect(on, "x", x, x.scalar_type());
  in.k = in.x.size(in.x.dim() - 1);
  if (k && *k != in.k) invalid("k: expected " + std::to_string(in.k) + ", as in x, or None, got " + std::to_string(*k));
  in.values = in.x.const_data_ptr();
  return in;
}

template <class On>
Tensor pack_signs_op(const Tensor& x_in) {
  const On on("x", x_in);
  const DType dtype = float_dtype("x", x_in);
  const int64_t rows = rows_of("x", x_in);
  const Tensor x = dense(x_in);
  Sizes sizes = sizes_of(x);
  const int64_t k = sizes.back();
  sizes.back() = binary_words(k);
  const Tensor bits = empty(on, sizes, ScalarType::Long);
  check(on.pack_signs(dtype, x.const_data_ptr(), rows, k, mutable_data<uint64_t>(bits)));
  return bits;
}

template <class On>
Tensor unpack_signs_op(const Tensor& bits_in, int64_t k) {
  const On on("bits", bits_in);
  const Tensor bits = expect_bits(on, "bits", bits_in, k);
  Sizes sizes = sizes_of(bits);
  sizes.back() = k;
  const Tensor x = empty(on, sizes, ScalarType::Float);
  check(on.unpack_signs(data<uint64_t>(bits), rows_of("bits", bits), k, mutable_data<float>(x)));
  return x;
}

template <class On>
Tensor binary_matmul_op(const Tensor& a_in, const Tensor& b_in, int64_t k) {
  const On on("a_bits", a_in);
  const Tensor a = expect_bits(on, "a_bits", a_in, k, 2);
  const Tensor b = expect_bits(on, "b_bits", b_in, k, 2);
  const Tensor out = empty(on, {a.size(0), b.size(0)}, ScalarType::Int);
  check(on.binary_matmul(data<uint64_t>(a), data<uint64_t>(b), a.size(0), b.size(0), k, mutable_data<int32_t>(out)));
  return out;
}

// What BinaryLinear and BinaryThreshold have in common.
template <class Layer>
Layer layer_of(const BinaryInput& in, const Tensor& weight_bits) {
  Layer args;
  args.dtype = in.dtype;
  args.x = in.values;
  args.x_bits = in.bits;
  args.m = in.m;
  args.n = weight_bits.size(0);
  args.k = in.k;
  args.weight_bits = data<uint64_t>(weight_bits);
  return args;
}

template <class On>
Tensor binary_linear_op(const Tensor& x, const Tensor& weight_bits_in, const Tensor& weight_scale_in,
                        const OptionalTensor& bias_in, OptionalInt k) {
  const On on("x", x);
  const BinaryInput in = parse_binary_input(on, x, k);
  const Tensor weight_bits = expect_bits(on, "weight_bits", weight_bits_in, in.k, 2);
  auto args = layer_of<BinaryLinear>(in, weight_bits);
  const Tensor weight_scale = expect_vector(on, "weight_scale", weight_scale_in, args.n);
  OptionalTensor bias;
  if (bias_in) bias = expect_vector(on, "bias", *bias_in, args.n);
  const Tensor y = empty(on, in.sizes(args.n), in.bits == nullptr ? x.scalar_type() : ScalarType::Float);
  args.y = y.mutable_data_ptr();
  args.weight_scale = data<float>(weight_scale);
  args.bias = bias ? data<float>(*bias) : nullptr;
  check(on.binary_linear(args));
  return y;
}

template <class On>
Tensor binary_threshold_op(const Tensor& x, const Tensor& weight_bits_in, const Tensor& threshold_in, OptionalInt k) {
  const On on("x", x);
  const BinaryInput in = parse_binary_input(on, x, k);
  const Tensor weight_bits = expect_bits(on, "weight_bits", weight_bits_in, in.k, 2);
  auto args = layer_of<BinaryThreshold>(in, weight_bits);
  const Tensor threshold = expect_vector(on, "threshold", threshold_in, args.n, ScalarType::Int);
  const Tensor y_bits = empty(on, in.sizes(binary_words(args.n)), ScalarType::Long);
  args.y_bits = mutable_data<uint64_t>(y_bits);
  args.threshold = data<int32_t>(threshold);
  check(on.binary_threshold(args));
  return y_bits;
}

// weight_bits [n, height, width, words]: of each tap the signs of all channels.
template <class On>
Tensor binary_conv2d_op(const Tensor& x, const Tensor& weight_bits_in, const Tensor& weight_scale_in,
                        const OptionalTensor& bias_in, const Pair& stride, const Pair& padding, const Pair& dilation) {
  const On on("x", x);
  if (x.dim() != 4)
    invalid("x: expected 4 axes (images, channels, height, width), got shape " + to_string(sizes_of(x)));
  const Tensor weight_bits = expect_bits(on, "weight_bits", weight_bits_in, x.size(1), 4);
  const Images images = parse_images(on, x, weight_bits.size(1), weight_bits.size(2), {stride, padding, dilation});
  BinaryLinear layer;
  layer.dtype = images.dtype;
  layer.x = images.x.const_data_ptr();
  layer.n = weight_bits.size(0);
  layer.weight_bits = data<uint64_t>(weight_bits);
  const Tensor weight_scale = expect_vector(on, "weight_scale", weight_scale_in, layer.n);
  OptionalTensor bias;
  if (bias_in) bias = expect_vector(on, "bias", *bias_in, layer.n);
  layer.weight_scale = data<float>(weight_scale);
  layer.bias = bias ? data<float>(*bias) : nullptr;
  return convolve(on, images, layer.n, [&](void* y) {
    layer.y = y;
    return on.binary_conv2d({images.shape, layer});
  });
}

template <class On>
void register_binary(torch::stable::detail::StableLibrary& m) {
  m.impl("pack_signs", Operator<&pack_signs_op<On>>::run);
  m.impl("unpack_signs", Operator<&unpack_signs_op<On>>::run);
  m.impl("binary_matmul", Operator<&binary_matmul_op<On>>::run);
  m.impl("binary_linear", Operator<&binary_linear_op<On>>::run);
  m.impl("binary_threshold", Operator<&binary_threshold_op<On>>::run);
  m.impl("binary_conv2d", Operator<&binary_conv2d_op<On>>::run);
}

}  // namespace kdq::bindings
