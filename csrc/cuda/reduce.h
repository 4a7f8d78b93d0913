// Reductions over the threads of a warp and of a block, in an order that is always the same.
#pragma once

#include "cuda/elements.h"

namespace kdq::cuda {

struct Sum {
  template <class V>
  KDQ_DEVICE V operator()(V a, V b) const {
    return a + b;
  }
};

// The larger; NaN where there is one.
struct Largest {
  KDQ_DEVICE float operator()(float a, float b) const { return is_nan(a) || a > b ? a : b; }
  KDQ_DEVICE uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};

// Every lane gets the result.
template <class Thread, class V, class Op>
KDQ_DEVICE V reduce_warp(Thread& thread, V value, Op op) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = op(value, thread.shuffle_xor(value, mask));
  return value;
}

// Every thread gets the result. shared: an entry a warp; free for use again after the next sync().
template <int kWarps, class Thread, class V, class Op>
KDQ_DEVICE V reduce_block(Thread& thread, V (&shared)[kWarps], V value, Op op) {
  value = reduce_warp(thread, value, op);
  if (thread.index() % kWarp == 0) shared[thread.index() / kWarp] = value;
  thread.sync();
  value = shared[0];
  for (int w = 1; w < kWarps; ++w) value = op(value, shared[w]);
  return value;
}

}  // namespace kdq::cuda
