// Peak loops on AVX-512 without VNNI: those of peaks_avx2.cpp on wider registers.
#include <immintrin.h>

#include "core/peaks_kernels.h"
#include "x86/peaks_simd.h"

namespace kdq {
namespace {

struct Int8 {
  using Vector = __m512i;
  static constexpr int kSums = 24;
  static constexpr double kOperations = 64;
  static Vector initial(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }
  static void step(Vector& sum, Vector a, Vector b) {
    Vector product;
    __asm__ volatile("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+v"(sum), "=&v"(product) : "v"(a), "v"(b));
  }
};

struct Binary {
  using Vector = __m512i;
  static constexpr int kSums = 16;
  static constexpr double kOperations = 512;
  static Vector initial(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static void step(Vector& sum, Vector a, Vector b) {
    Vector count;
    __asm__ volatile("vpshufb %2, %3, %1\n\tvpaddb %1, %0, %0" : "+v"(sum), "=&v"(count) : "v"(a), "v"(b));
  }
};

struct Float32 {
  using Vector = __m512;
  static constexpr int kSums = 24;
  static constexpr double kOperations = 32;
  static Vector initial(int value) { return _mm512_set1_ps(static_cast<float>(value)); }
  static void step(Vector& sum, Vector a, Vector b) {
    __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};

struct Read {
  using Vector = __m512i;
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector add(Vector sum, const char* source) { return _mm512_add_epi64(sum, _mm512_load_si512(source)); }
};

}  // namespace

extern const PeakKernels kPeaksAvx512 = {
    run_peak<Int8>, run_peak<Binary>, run_peak<Float32>, {}, {run_read<Read, 1>, run_read<Read, 4>},
};

}  // namespace kdq
