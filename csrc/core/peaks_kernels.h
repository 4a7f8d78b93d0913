// What an ISA provides for measuring the machine: loops that do nothing but the arithmetic at issue, all operands in
// registers, enough independent sums to hide the latency. They run `steps` steps and return how many operations that
// was.
#pragma once

#include <cstdint>

namespace kdq {

struct PeakKernels {
  double (*int8)(int64_t steps);
  double (*binary)(int64_t steps);
  double (*float32)(int64_t steps);
};

extern const PeakKernels kPeaksReference;
extern const PeakKernels kPeaksAvx2;
extern const PeakKernels kPeaksAvxVnni;
extern const PeakKernels kPeaksAvx512;
extern const PeakKernels kPeaksAvx512Vnni;
extern const PeakKernels kPeaksAvx512Vpopcntdq;

}  // namespace kdq
