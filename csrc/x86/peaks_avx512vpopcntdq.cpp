// Peak loop of xor + vpopcntq + add.
#include <immintrin.h>

#include "core/peaks_kernels.h"
#include "x86/peaks_simd.h"

namespace kdq {
namespace {

struct Binary {
  using Vector = __m512i;
  static constexpr int kSums = 16;
  static constexpr double kOperations = 1024;
  static Vector initial(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static void step(Vector& sum, Vector a, Vector b) {
    Vector different;
    __asm__ volatile("vpxorq %2, %3, %1\n\tvpopcntq %1, %1\n\tvpaddq %1, %0, %0"
                     : "+v"(sum), "=&v"(different)
                     : "v"(a), "v"(b));
  }
};

}  // namespace

extern const PeakKernels kPeaksAvx512Vpopcntdq = {nullptr, run_peak<Binary>};

}  // namespace kdq
