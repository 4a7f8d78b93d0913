// The codebook family on AVX-512: vpermps looks up one of 16 centroids for 16 lanes, vpermi2ps one of 32.
#include "x86/vec_avx512.h"

namespace kdq {
namespace {

struct Four {
  explicit Four(const float* table) : low(Vec::load(table)) {}
  Vec::Float at(Vec::Int index) const { return _mm512_permutexvar_ps(index, low); }
  Vec::Float low;
};
using Small = Four;
constexpr int kSmallBits = 4;

struct Five {
  explicit Five(const float* table) : low(Vec::load(table)), high(Vec::load(table + 16)) {}
  Vec::Float at(Vec::Int index) const { return _mm512_permutex2var_ps(low, index, high); }
  Vec::Float low;
  Vec::Float high;
};

// 24 sums, 2 words, 2 of the table, 1 number of bits, 1 vector of weights: 30 of 32 registers.
constexpr int kTileRows = 12;
constexpr int most_panels(int rows) { return rows <= 2 ? 8 : rows <= 5 ? 4 : 2; }

}  // namespace
}  // namespace kdq

#include "x86/codebook_simd.h"

namespace kdq {

extern const CodebookKernels kCodebookAvx512 = make_codebook_kernels<Loops>(kTileRows);

}  // namespace kdq
