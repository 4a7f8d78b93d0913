// torch.ops.kdq: attention.
#pragma once

#include "kdq/attention.h"
#include "torch_common.h"

namespace kdq::bindings {

// An operand [batch, heads, rows, columns] as the kernels read it: its last axis is dense in memory.
struct AttentionOperand {
  Tensor tensor;
  AttentionStrides strides;
};

inline AttentionOperand as_operand(const Tensor& t) {
  const bool in_place = t.size(3) <= 1 || t.stride(3) == 1;
  AttentionOperand operand = {in_place ? t : contiguous(t), {}};
  operand.strides = {operand.tensor.stride(0), operand.tensor.stride(1), operand.tensor.stride(2)};
  return operand;
}

template <class On>
AttentionOperand expect_heads(const On& on, const char* name, const Tensor& t, ScalarType type) {
  if (!on.has(t)) invalid(std::string(name) + ": expected " + on.kind());
  if (t.scalar_type() != type) {
    invalid(std::string(name) + ": expected dtype " + type_name(type) + ", got " + type_name(t.scalar_type()));
  }
  if (t.dim() != 4) invalid(std::string(name) + ": expected 4 axes, got shape " + to_string(sizes_of(t)));
  return as_operand(t);
}

inline void expect_sizes(const char* name, const Tensor& t, const Sizes& sizes) {
  if (sizes_of(t) == sizes) return;
  invalid(std::string(name) + ": expected shape " + to_string(sizes) + ", got " + to_string(sizes_of(t)));
}

// The mask of args, which has its sizes already.
template <class On>
AttentionOperand expect_mask(const On& on, const Tensor& mask, Attention* args) {
  const bool is_bool = mask.scalar_type() == ScalarType::Bool;
  if (!is_bool && mask.scalar_type() != ScalarType::Float) {
    invalid("attn_mask: expected dtype bool or float32, got " + type_name(mask.scalar_type()));
  }
  AttentionOperand operand = expect_heads(on, "attn_mask", mask, mask.scalar_type());
  const int64_t wanted[4] = {args->batch, args->heads, args->queries, args->keys};
  int64_t* const strides[3] = {&operand.strides.batch, &operand.strides.head, &operand.strides.row};
  for (int axis = 0; axis < 4; ++axis) {
    const int64_t size = mask.size(axis);
    if (size != wanted[axis] && (size != 1 || axis == 3)) {
      invalid("attn_mask: expected shape " + to_string({wanted, wanted + 4}) +
              ", or 1 along any of the first three axes, got " + to_string(sizes_of(mask)));
    }
    if (axis < 3 && size == 1) *strides[axis] = 0;
  }
  args->mask_kind = is_bool ? MaskKind::kBool : MaskKind::kFloat32;
  args->mask = operand.tensor.const_data_ptr();
  args->mask_strides = operand.strides;
  return operand;
}

template <class On>
Tensor attention_op(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& mask_in,
                    bool is_causal, double scale) {
  const On on("query", q_in);
  Attention args;
  args.dtype = float_dtype("query", q_in);
  const AttentionOperand q = expect_heads(on, "query", q_in, q_in.scalar_type());
  const AttentionOperand k = expect_heads(on, "key", k_in, q_in.scalar_type());
  const AttentionOperand v = expect_heads(on, "value", v_in, q_in.scalar_type());
  args.batch = q_in.size(0);
  args.heads = q_in.size(1);
  args.queries = q_in.size(2);
  args.head_size = q_in.size(3);
  args.kv_heads = k_in.size(1);
  args.keys = k_in.size(2);
  args.value_size = v_in.size(3);
  expect_sizes("key", k_in, {args.batch, args.kv_heads, args.keys, args.head_size});
  expect_sizes("value", v_in, {args.batch, args.kv_heads, args.keys, args.value_size});
  AttentionOperand mask;
  if (mask_in) mask = expect_mask(on, *mask_in, &args);
  args.causal = is_causal;
  args.scale = static_cast<float>(scale);
  // Heads of a query side by side, as the projection behind them wants to read them.
  const Tensor y =
      on.empty_strided({args.batch, args.heads, args.queries, args.value_size},
                       {args.heads * args.queries * args.value_size, args.value_size, args.heads * args.value_size, 1},
                       q_in.scalar_type());
  args.q = q.tensor.const_data_ptr();
  args.k = k.tensor.const_data_ptr();
  args.v = v.tensor.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.q_strides = q.strides;
  args.k_strides = k.strides;
  args.v_strides = v.strides;
  args.y_strides = {y.stride(0), y.stride(1), y.stride(2)};
  check(on.scaled_dot_product_attention(args));
  return y;
}

template <class On>
void register_attention(torch::stable::detail::StableLibrary& m) {
  m.impl("scaled_dot_product_attention", Operator<&attention_op<On>>::run);
}

}  // namespace kdq::bindings
