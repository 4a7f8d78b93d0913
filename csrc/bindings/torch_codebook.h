// torch.ops.kdq: the codebook family. Packed indices are int32: torch has no arithmetic on uint32; the words are the
// same.
#pragma once

#include "kdq/codebook.h"
#include "layer_args.h"
#include "torch_common.h"

namespace kdq::bindings {

template <class On>
Tensor pack_indices_op(const Tensor& indices_in, int64_t bits) {
  const On on("indices", indices_in);
  const Tensor indices = expect(on, "indices", indices_in, ScalarType::Byte, 2);
  check(check_index_bits(bits));
  const int64_t n = indices.size(0);
  const int64_t k = indices.size(1);
  const int width = static_cast<int>(bits);
  const Tensor packed = empty(on, {codebook_panels(n), codebook_words(k, width), kCodebookLanes}, ScalarType::Int);
  check(on.pack_indices(data<uint8_t>(indices), n, k, width, mutable_data<uint32_t>(packed)));
  return packed;
}

template <class On>
Tensor unpack_indices_op(const Tensor& packed_in, int64_t bits, int64_t n, int64_t k) {
  const On on("packed", packed_in);
  const Tensor packed = expect(on, "packed", packed_in, ScalarType::Int, 3);
  check(check_index_bits(bits));
  const int width = static_cast<int>(bits);
  if (k < 0) invalid("k: expected at least 0, got " + std::to_string(k));
  check(check_packed_indices(sizes_of(packed), n, k, width));
  const Tensor indices = empty(on, {n, k}, ScalarType::Byte);
  check(on.unpack_indices(data<uint32_t>(packed), n, k, width, mutable_data<uint8_t>(indices)));
  return indices;
}

template <class On>
Tensor codebook_linear_op(const Tensor& x_in, const Tensor& packed_in, const Tensor& codebook_in, int64_t out_features,
                          const OptionalTensor& bias_in, const std::optional<std::string>& activation) {
  const On on("x", x_in);
  CodebookLinear args;
  args.dtype = float_dtype("x", x_in);
  args.m = rows_of("x", x_in);
  const Tensor x = expect_here(on, "x", x_in);
  Sizes sizes = sizes_of(x);
  args.k = sizes.back();
  args.n = out_features;
  const Tensor codebook = expect(on, "codebook", codebook_in, ScalarType::Float, 1);
  check(codebook_bits(codebook.size(0), &args.bits));
  const Tensor packed = expect(on, "packed", packed_in, ScalarType::Int, 3);
  check(check_packed_indices(sizes_of(packed), args.n, args.k, args.bits));
  OptionalTensor bias;
  if (bias_in) bias = expect_vector(on, "bias", *bias_in, args.n);
  check(activation_from_name(activation, &args.activation));
  sizes.back() = args.n;
  const Tensor y = empty(on, sizes, x.scalar_type());
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.packed = data<uint32_t>(packed);
  args.codebook = data<float>(codebook);
  args.bias = bias ? data<float>(*bias) : nullptr;
  check(on.codebook_linear(args));
  return y;
}

template <class On>
void register_codebook(torch::stable::detail::StableLibrary& m) {
  m.impl("pack_indices", Operator<&pack_indices_op<On>>::run);
  m.impl("unpack_indices", Operator<&unpack_indices_op<On>>::run);
  m.impl("codebook_linear", Operator<&codebook_linear_op<On>>::run);
}

}  // namespace kdq::bindings
