// Peak loops in plain C++: what the compiler makes of scalar code. A barrier after each step keeps it from being
// removed.
#include <cstring>

#include "core/peaks_kernels.h"

namespace kdq {
namespace {

constexpr int kSums = 8;

template <class T, class Step>
void run(int64_t steps, T a, T b, Step step) {
  T sum[kSums] = {};
  for (int64_t i = 0; i < steps; ++i) {
    for (int s = 0; s < kSums; ++s) sum[s] = step(sum[s], a, b);
    __asm__ volatile("" : "+m"(sum), "+r"(a), "+r"(b));
  }
}

double int8(int64_t steps) {
  run<int32_t>(steps, 3, 5, [](int32_t sum, int32_t a, int32_t b) { return sum + a * b; });
  return 2.0 * kSums * static_cast<double>(steps);
}

double binary(int64_t steps) {
  run<uint64_t>(steps, 3, 5, [](uint64_t sum, uint64_t a, uint64_t b) {
    return sum + static_cast<uint64_t>(__builtin_popcountll(a ^ (b + sum)));
  });
  return 2.0 * 64 * kSums * static_cast<double>(steps);
}

double float32(int64_t steps) {
  float sum[kSums] = {};
  float a = 3;
  float b = 5;
  for (int64_t i = 0; i < steps; ++i) {
    for (float& s : sum) s += a * b;
    __asm__ volatile("" : "+m"(sum), "+m"(a), "+m"(b));
  }
  return 2.0 * kSums * static_cast<double>(steps);
}

void read(const char* source, int64_t bytes) {
  uint64_t sum[kSums] = {};
  for (int64_t i = 0; i < bytes; i += 8 * kSums) {
    uint64_t words[kSums];
    std::memcpy(words, source + i, sizeof(words));
    for (int s = 0; s < kSums; ++s) sum[s] += words[s];
  }
  __asm__ volatile("" ::"m"(sum));
}

}  // namespace

const PeakKernels kPeaksReference = {int8, binary, float32, {}, {read}};

}  // namespace kdq
