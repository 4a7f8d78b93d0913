// What an ISA provides for measuring the machine. A loop of arithmetic does nothing but the instructions at issue, all
// operands in registers, with enough independent sums to hide the latency. A table holds what is new on its level; null
// where there is nothing.
#pragma once

#include <cstdint>

namespace kdq {

// Runs that many steps and returns how many operations they were.
using PeakLoop = double (*)(int64_t steps);

// `bytes` is a multiple of kPeakGrain; the buffers are aligned to 64 bytes.
using PeakCopy = void (*)(char* target, const char* source, int64_t bytes);
using PeakRead = void (*)(const char* source, int64_t bytes);
constexpr int64_t kPeakGrain = 512;

struct PeakKernels {
  PeakLoop int8 = nullptr;
  PeakLoop binary = nullptr;
  PeakLoop float32 = nullptr;
  PeakCopy copies[2] = {};
  PeakRead reads[2] = {};
  PeakLoop bfloat16 = nullptr;
};

extern const PeakKernels kPeaksReference;
extern const PeakKernels kPeaksAvx2;
extern const PeakKernels kPeaksAvxVnni;
extern const PeakKernels kPeaksAvx512;
extern const PeakKernels kPeaksAvx512Vnni;
extern const PeakKernels kPeaksAvx512Vpopcntdq;
extern const PeakKernels kPeaksAvx512Bf16;

}  // namespace kdq
