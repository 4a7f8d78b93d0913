// The binary family on AVX-512 VPOPCNTDQ: xor, vpopcntq, add, three instructions for 512 bits.
#include "x86/vec_avx512.h"
#include "x86/words_avx512.h"

namespace kdq {
namespace {

struct Bits : Words512 {
  static constexpr int64_t kFlush = int64_t{1} << 40;  // sums are 64 bits wide already
  // 24 sums, 4 weight vectors, 1 broadcast, 1 count in flight: 30 of 32 registers.
  static constexpr int kRows = 6;
  static constexpr int kCols = 4;

  static Words add(Words sum, Words v) { return _mm512_add_epi64(sum, _mm512_popcnt_epi64(v)); }
  static Words add_widened(Words total, Words sum) { return _mm512_add_epi64(total, sum); }
};

}  // namespace
}  // namespace kdq

#include "x86/binary_gemm_simd.h"

namespace kdq {

extern const BinaryKernels kBinaryAvx512Vpopcntdq = make_binary_kernels<Loops>({Bits::kRows, Loops::kPanel, 3});

}  // namespace kdq
