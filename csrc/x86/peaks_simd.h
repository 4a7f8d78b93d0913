// The frames of the peak loops. The arithmetic is inline assembly: a compiler that saw intrinsics would notice that the
// operands never change and compute nothing.
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

// Adds up all of the source, from kStreams places at once: one is the fastest from caches, several from memory.
template <class Op, int kStreams>
void run_read(const char* source, int64_t bytes) {
  constexpr int kSums = 8;
  constexpr int kRun = kSums / kStreams;
  constexpr int64_t kBytes = sizeof(typename Op::Vector);
  const int64_t part = bytes / kStreams;
  typename Op::Vector sum[kSums];
#pragma GCC unroll 8
  for (int s = 0; s < kSums; ++s) sum[s] = Op::zero();
  for (int64_t i = 0; i < part; i += kRun * kBytes) {
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s) {
      sum[s] = Op::add(sum[s], source + (s / kRun) * part + i + (s % kRun) * kBytes);
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < kSums; ++s) __asm__ volatile("" ::"v"(sum[s]));
}

}  // namespace
}  // namespace kdq
