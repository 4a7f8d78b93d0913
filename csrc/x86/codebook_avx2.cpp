// The codebook family on AVX2: vpermps looks up one of 8 centroids for 8 lanes; blends by the bits above choose among
// two or four such look-ups.
#include "x86/vec_avx2.h"

namespace kdq {
namespace {

inline Vec::Float eight(const float* table, int i) { return Vec::load(table + 8 * i); }

// `yes` where bit kBit of the index is set.
template <int kBit>
inline Vec::Float choose(Vec::Int index, Vec::Float no, Vec::Float yes) {
  return _mm256_blendv_ps(no, yes, Vec::as_float(Vec::shift_left<31 - kBit>(index)));
}

struct Small {
  explicit Small(const float* table) : low(eight(table, 0)) {}
  Vec::Float at(Vec::Int index) const { return _mm256_permutevar8x32_ps(low, index); }
  Vec::Float low;
};
constexpr int kSmallBits = 3;

struct Four {
  explicit Four(const float* table) : low(eight(table, 0)), high(eight(table, 1)) {}
  Vec::Float at(Vec::Int index) const {
    return choose<3>(index, _mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index));
  }
  Vec::Float low;
  Vec::Float high;
};

struct Five {
  explicit Five(const float* table) : low(table), high(table + 16) {}
  Vec::Float at(Vec::Int index) const { return choose<4>(index, low.at(index), high.at(index)); }
  Four low;
  Four high;
};

// With 4 bits: 8 sums, 2 vectors of words, 2 of the table, 1 number of bits, 1 broadcast, 2 look-ups in flight: all 16
// registers. With 5 bits some of the table is read from memory.
constexpr int kTileRows = 4;
constexpr int most_panels(int rows) { return rows == 1 ? 2 : 1; }

}  // namespace
}  // namespace kdq

#include "x86/codebook_simd.h"

namespace kdq {

extern const CodebookKernels kCodebookAvx2 = make_codebook_kernels<Loops>(kTileRows);

}  // namespace kdq
