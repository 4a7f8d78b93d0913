// Peak loop of binary products by table: no xor, no popcount. For seven activations a table of 128 bytes holds the
// product with every pattern of seven weights; vpermi2b looks up 64 output channels at once. No kernel here works so,
// but one could. Making the tables, once for all output channels, and widening the sums, once in 36 steps, are left
// out.
#include <immintrin.h>

#include "core/peaks_kernels.h"
#include "x86/peaks_simd.h"

namespace kdq {
namespace {

struct Binary {
  using Vector = __m512i;
  static constexpr int kSums = 8;
  static constexpr double kOperations = 2 * 7 * 64;
  static Vector initial(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static void step(Vector& sum, Vector weights, Vector table) {
    Vector product;
    __asm__ volatile("vmovdqa64 %2, %1\n\tvpermi2b %3, %3, %1\n\tvpaddb %1, %0, %0"
                     : "+v"(sum), "=&v"(product)
                     : "v"(weights), "v"(table));
  }
};

}  // namespace

extern const PeakKernels kPeaksAvx512Vbmi = {nullptr, run_peak<Binary>};

}  // namespace kdq
