// Peak loops on AVX2: the best exact instruction sequences that the kernels could be made of.
#include "x86/peaks_avx2.h"

namespace kdq {
namespace {

struct Int8 {
  using Vector = __m256i;
  static constexpr int kSums = 12;
  static constexpr double kOperations = 32;  // 16 multiplies and adds
  static Vector initial(int value) { return _mm256_set1_epi16(static_cast<short>(value)); }
  static void step(Vector& sum, Vector a, Vector b) {
    Vector product;
    __asm__ volatile("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
  }
};

}  // namespace

extern const PeakKernels kPeaksAvx2 = {run_peak<Int8>, run_peak<Binary>, run_peak<Float32>};

}  // namespace kdq
