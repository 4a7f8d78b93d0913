// The frame of the peak loops. The instructions are inline assembly: a compiler that saw intrinsics would notice that
// the operands never change and compute nothing.
#pragma once

#include <stdint.h>

namespace kdq {
namespace {

// steps x kSums times Op::step on independent sums. Returns the operations done.
template <class Op>
double run_peak(int64_t steps) {
  typename Op::Vector a = Op::initial(1);
  typename Op::Vector b = Op::initial(2);
  typename Op::Vector sum[Op::kSums];
#pragma GCC unroll 32
  for (int s = 0; s < Op::kSums; ++s) sum[s] = Op::initial(0);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 32
    for (int s = 0; s < Op::kSums; ++s) Op::step(sum[s], a, b);
  }
#pragma GCC unroll 32
  for (int s = 0; s < Op::kSums; ++s) __asm__ volatile("" ::"v"(sum[s]));
  return Op::kOperations * Op::kSums * static_cast<double>(steps);
}

}  // namespace
}  // namespace kdq
