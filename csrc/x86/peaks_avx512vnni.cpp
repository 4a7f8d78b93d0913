// Peak loop of AVX-512 VNNI: vpdpbusd, 64 products an instruction.
#include <immintrin.h>

#include "core/peaks_kernels.h"
#include "x86/peaks_simd.h"

namespace kdq {
namespace {

struct Int8 {
  using Vector = __m512i;
  static constexpr int kSums = 24;
  static constexpr double kOperations = 128;
  static Vector initial(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static void step(Vector& sum, Vector a, Vector b) {
    __asm__ volatile("vpdpbusd %1, %2, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};

}  // namespace

extern const PeakKernels kPeaksAvx512Vnni = {run_peak<Int8>};

}  // namespace kdq
