// scaled_dot_product_attention: softmax(scale q k^T + mask) v in float32, without the matrix of all scores.
//
// Vaswani et al.: Attention Is All You Need, 2017. Scores are made a block of keys at a time, and what came before is
// rescaled where a block raises a row's maximum (Dao et al.: FlashAttention, 2022). Products, exponentials and sums are
// float32, and what a query gets does not depend on the number of threads. Keys that a mask takes out have to be
// finite, as have their values: some of them are multiplied by 0, those that come later for a causal query among them.
#pragma once

#include "kdq/parallel.h"
#include "kdq/status.h"
#include "kdq/types.h"

namespace kdq {

// An operand [batch, heads, rows, columns]: elements from one to the next along each axis but the last, where it is 1.
struct AttentionStrides {
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
};

enum class MaskKind : int {
  kNone = 0,
  kFloat32 = 1,  // added to the scores
  kBool = 2,     // bytes: a key whose byte is 0 takes no part
};

struct Attention {
  DType dtype = DType::kFloat32;
  const void* q = nullptr;  // [batch, heads, queries, head_size]
  const void* k = nullptr;  // [batch, kv_heads, keys, head_size]
  const void* v = nullptr;  // [batch, kv_heads, keys, value_size]
  void* y = nullptr;        // [batch, heads, queries, value_size]
  AttentionStrides q_strides;
  AttentionStrides k_strides;
  AttentionStrides v_strides;
  AttentionStrides y_strides;
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;  // divides heads: query head h reads head h / (heads / kv_heads)
  int64_t queries = 0;
  int64_t keys = 0;
  int64_t head_size = 0;
  int64_t value_size = 0;
  float scale = 1.0F;  // of a magnitude up to 1e38

  MaskKind mask_kind = MaskKind::kNone;
  const void* mask = nullptr;     // [batch, heads, queries, keys]
  AttentionStrides mask_strides;  // 0 along axes that it does not have
  bool causal = false;            // query i takes keys up to i, beside the mask
};

// A query that no key takes part for gets zeros, as in torch.
KDQ_API Status scaled_dot_product_attention(const Attention& args, const ParallelFor& parallel_for);

}  // namespace kdq
