// Peak loops on AVX2 with AVX-VNNI: vpdpbusd, 32 products an instruction.
#include "x86/peaks_avx2.h"

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

extern const PeakKernels kPeaksAvxVnni = {run_peak<Int8>, run_peak<Binary>, run_peak<Float32>};

}  // namespace kdq
