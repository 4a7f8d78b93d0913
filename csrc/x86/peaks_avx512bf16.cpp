// Peak loop of AVX-512 BF16: vdpbf16ps, 32 products an instruction.
#include <immintrin.h>

#include "core/peaks_kernels.h"
#include "x86/peaks_simd.h"

namespace kdq {
namespace {

struct BFloat16Pairs {
  using Vector = __m512;
  static constexpr int kSums = 24;
  static constexpr double kOperations = 64;
  static Vector initial(int value) { return _mm512_set1_ps(static_cast<float>(value)); }  // pairs of 0 and the value
  static void step(Vector& sum, Vector a, Vector b) {
    __asm__ volatile("vdpbf16ps %1, %2, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};

}  // namespace

extern const PeakKernels kPeaksAvx512Bf16 = {nullptr, nullptr, nullptr, {}, {}, run_peak<BFloat16Pairs>};

}  // namespace kdq
