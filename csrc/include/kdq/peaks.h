// peaks: what this machine can do at most, measured now, so that a benchmark can say how much of it a kernel reaches.
#pragma once

#include <cstdint>

#include "kdq/status.h"

namespace kdq {

// What can limit a kernel. An "operation" is one multiply or one add: a multiply-accumulate counts two, and so does
// each bit of xor + popcount (the multiply and add of a +-1 product). For each the best of several instruction
// sequences counts, among all that the ISA in force and those below it allow.
enum class Peak {
  kInt8,      // exact int8 multiply-accumulate, operands in registers
  kBinary,    // the product of +-1 values given as bits, operands in registers
  kFloat32,   // fused multiply-add on float32, operands in registers
  kCopy,      // copying a buffer: bytes read plus bytes written
  kRead,      // reading a buffer again and again: from whichever cache it fits in, or from memory
  kBFloat16,  // multiply-accumulate of bfloat16 into float32, operands in registers; by kFloat32's means if need be
};

// Operations, or bytes, a second on `threads` threads at once.
//
// bytes: the size of the buffer, for kCopy and kRead only; it is shared out among the threads.
// seconds: how long the measurement takes, about; the best of its rounds is kept.
KDQ_API Status measure_peak(Peak peak, int threads, int64_t bytes, double seconds, double* rate);

}  // namespace kdq
