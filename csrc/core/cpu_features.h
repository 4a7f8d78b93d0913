// What CPU and operating system can run, one flag per instruction-set extension that a kernel here may use.
#pragma once

#include <string>

namespace kdq {

struct CpuFeatures {
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool avxvnni = false;  // vpdpbusd on YMM registers, without AVX-512
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512vl = false;
  bool avx512dq = false;
  bool avx512vnni = false;
  bool avx512vpopcntdq = false;
  bool avx512bf16 = false;
};

// Read once; the same for the life of the process.
const CpuFeatures& cpu_features();

}  // namespace kdq
