// peaks: what this machine can do at most, measured now, so that a benchmark can say how much of it a kernel reaches.
#pragma once

#include "kdq/parallel.h"
#include "kdq/status.h"

namespace kdq {

// All rates are for `threads` threads running at once. An "operation" is one multiply or one add: a multiply-accumulate
// counts two, and so does each bit of xor + popcount (the multiply and add of a +-1 product).
struct MachinePeaks {
  int threads = 1;
  double int8_gops = 0;       // best exact int8 multiply-accumulate sequence of the ISA in force, operands in registers
  double binary_gops = 0;     // best xor + popcount + add sequence of the ISA in force, operands in registers
  double float32_gflops = 0;  // fused multiply-add on float32, operands in registers
  double copy_gbps = 0;       // bytes read plus bytes written a second, buffers of copy_bytes each
  int64_t copy_bytes = 0;
};

// seconds: how long each of the four loops may take; the best of several rounds is kept.
KDQ_API Status measure_peaks(int threads, int64_t copy_bytes, double seconds, MachinePeaks* peaks);

}  // namespace kdq
