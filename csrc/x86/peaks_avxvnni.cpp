// Peak loop of AVX-VNNI: vpdpbusd, 32 products an instruction.
#include <immintrin.h>

#include "core/peaks_kernels.h"
#include "x86/peaks_simd.h"

namespace kdq {
namespace {

struct Int8 {
  using Vector = __m256i;
  static constexpr int kSums = 12;
  static constexpr double kOperations = 64;
  static Vector initial(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static void step(Vector& sum, Vector a, Vector b) {
    __asm__ volatile("%{vex%} vpdpbusd %1, %2, %0" : "+x"(sum) : "x"(a), "x"(b));
  }
};

}  // namespace

extern const PeakKernels kPeaksAvxVnni = {run_peak<Int8>};

}  // namespace kdq
