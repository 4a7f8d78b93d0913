// Which instruction set the kernels run on: what the library was built with, what this CPU and its operating
// system can run, and which one is in force.
//
// Three gates: a level must be built in, the CPU *and* the OS must have it, and it must be enabled. The best level
// that passes is in force; KDQ_ISA=avx2 in the environment (read once, at first use) or set_isa() forces another.
// Asking for a level that cannot run is an error, never a silent fallback. Integer results are bit-equal on every
// level.
#pragma once

#include <string>
#include <vector>

#include "kdq/status.h"

namespace kdq {

enum class Isa : int {
  kReference = 0,   // plain C++, the specification
  kAvx2 = 1,        // AVX2 + FMA + F16C
  kAvx512 = 2,      // AVX-512 F, BW, VL, DQ
  kAvx512Vnni = 3,  // + VNNI; VPOPCNTDQ and AVX-512 BF16 are used where present
};

// "reference", "avx2", "avx512", "avx512vnni".
KDQ_API const char* isa_name(Isa isa);

// The level in force. Fails when KDQ_ISA names a level that is unknown or cannot run here.
KDQ_API Status current_isa(Isa* isa);

// Forces a level by name for the whole process; "auto" returns to the best one.
KDQ_API Status set_isa(const std::string& name);

// Every level that passes the first two gates, lowest first.
KDQ_API std::vector<Isa> available_isas();

// Which single instruction-set extensions CPU and OS have, e.g. "avx2 fma f16c avx512f"; for build_info().
KDQ_API std::string cpu_features_string();

// The CPU's marketing name as CPUID tells it, or "unknown".
KDQ_API std::string cpu_name();

}  // namespace kdq
