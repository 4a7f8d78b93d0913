// The fake-quant family on AVX2.
#include "x86/vec_avx2.h"

#include "x86/fake_quant_simd.h"

namespace kdq {

extern const FakeQuantKernels kFakeQuantAvx2 = make_fake_quant_kernels<Loops>();

}  // namespace kdq
