// Peak loops on AVX2: the best exact instruction sequences that the kernels could be made of, and what moves memory.
#include <immintrin.h>

#include "core/peaks_kernels.h"
#include "x86/peaks_simd.h"

namespace kdq {
namespace {

// On weights widened to 16 bits ahead. vpsignb + vpmaddubsw + vpmaddwd + vpaddd, exact for weights in [-127, 127], is
// slower: three of its four instructions compete for the multipliers.
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

// A lookup and an addition for four bits in each byte, as in nibble_steps.h; widening, once in 63 steps, is left out.
struct Binary {
  using Vector = __m256i;
  static constexpr int kSums = 12;
  static constexpr double kOperations = 256;
  static Vector initial(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static void step(Vector& sum, Vector a, Vector b) {
    Vector count;
    __asm__ volatile("vpshufb %2, %3, %1\n\tvpaddb %1, %0, %0" : "+x"(sum), "=&x"(count) : "x"(a), "x"(b));
  }
};

struct Float32 {
  using Vector = __m256;
  static constexpr int kSums = 12;
  static constexpr double kOperations = 16;
  static Vector initial(int value) { return _mm256_set1_ps(static_cast<float>(value)); }
  static void step(Vector& sum, Vector a, Vector b) {
    __asm__ volatile("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(a), "x"(b));
  }
};

struct Read {
  using Vector = __m256i;
  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector add(Vector sum, const char* source) {
    return _mm256_add_epi64(sum, _mm256_load_si256(reinterpret_cast<const __m256i*>(source)));
  }
};

// The CPU's own copy: on many the best from memory, since it need not read the lines that it overwrites.
void copy_by_rep_movsb(char* target, const char* source, int64_t bytes) {
  __asm__ volatile("rep movsb" : "+D"(target), "+S"(source), "+c"(bytes)::"memory");
}

// 64 bytes past the caches.
void stream_line(char* target, const char* source) {
  const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(source));
  const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(source + 32));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(target), low);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(target + 32), high);
}

// Two places at once keep more of the memory busy than one.
void copy_past_caches(char* target, const char* source, int64_t bytes) {
  const int64_t half = bytes / 2;
  for (int64_t i = 0; i < half; i += 64) {
    stream_line(target + i, source + i);
    stream_line(target + half + i, source + half + i);
  }
  _mm_sfence();
}

}  // namespace

extern const PeakKernels kPeaksAvx2 = {
    run_peak<Int8>,
    run_peak<Binary>,
    run_peak<Float32>,
    {copy_by_rep_movsb, copy_past_caches},
    {run_read<Read, 1>, run_read<Read, 4>},
};

}  // namespace kdq
