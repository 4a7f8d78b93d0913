// torch.ops.kdq: the binary family on CPU tensors. Bits are int64: torch has no arithmetic on uint64; the words are the
// same.
#include "kdq/binary_gemm.h"

#include "torch_ops.h"

namespace kdq::bindings {
namespace {

// Bits of shape [..., binary_words(k)].
Tensor expect_bits(const char* name, const Tensor& t, int64_t k, int64_t ndim = -1) {
  const Tensor bits = expect(name, t, ScalarType::Long, ndim);
  if (k < 0) invalid("k: expected at least 0, got " + std::to_string(k));
  if (bits.dim() < 1 || bits.size(bits.dim() - 1) != binary_words(k)) {
    invalid(std::string(name) + ": expected " + std::to_string(binary_words(k)) +
            " words in the last axis for k = " + std::to_string(k) + ", got shape " + to_string(sizes_of(t)));
  }
  return bits;
}

}  // namespace

Tensor pack_signs_op(const Tensor& x_in) {
  const DType dtype = float_dtype("x", x_in);
  const int64_t rows = rows_of("x", x_in);
  const Tensor x = dense(x_in);
  Sizes sizes = sizes_of(x);
  const int64_t k = sizes.back();
  sizes.back() = binary_words(k);
  const Tensor bits = empty(sizes, ScalarType::Long);
  check(pack_signs(dtype, x.const_data_ptr(), rows, k, mutable_data<uint64_t>(bits), torch_executor()));
  return bits;
}

Tensor unpack_signs_op(const Tensor& bits_in, int64_t k) {
  const Tensor bits = expect_bits("bits", bits_in, k);
  Sizes sizes = sizes_of(bits);
  sizes.back() = k;
  const Tensor x = empty(sizes, ScalarType::Float);
  check(unpack_signs(data<uint64_t>(bits), rows_of("bits", bits), k, mutable_data<float>(x), torch_executor()));
  return x;
}

Tensor binary_matmul_op(const Tensor& a_in, const Tensor& b_in, int64_t k) {
  const Tensor a = expect_bits("a_bits", a_in, k, 2);
  const Tensor b = expect_bits("b_bits", b_in, k, 2);
  const Tensor out = empty({a.size(0), b.size(0)}, ScalarType::Int);
  check(binary_matmul(data<uint64_t>(a), data<uint64_t>(b), a.size(0), b.size(0), k, mutable_data<int32_t>(out),
                      torch_executor()));
  return out;
}

Tensor binary_linear_op(const Tensor& x_in, const Tensor& weight_bits_in, const Tensor& weight_scale_in,
                        const OptionalTensor& bias_in) {
  BinaryLinear args;
  args.dtype = float_dtype("x", x_in);
  args.m = rows_of("x", x_in);
  const Tensor x = expect("x", x_in, x_in.scalar_type());
  Sizes sizes = sizes_of(x);
  args.k = sizes.back();
  const Tensor weight_bits = expect_bits("weight_bits", weight_bits_in, args.k, 2);
  args.n = weight_bits.size(0);
  const Tensor weight_scale = expect_vector("weight_scale", weight_scale_in, args.n);
  OptionalTensor bias;
  if (bias_in) bias = expect_vector("bias", *bias_in, args.n);
  sizes.back() = args.n;
  const Tensor y = empty(sizes, x.scalar_type());
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.weight_bits = data<uint64_t>(weight_bits);
  args.weight_scale = data<float>(weight_scale);
  args.bias = bias ? data<float>(*bias) : nullptr;
  check(binary_linear(args, torch_executor()));
  return y;
}

}  // namespace kdq::bindings
