// The fake-quant family on AVX-512.
#include "x86/vec_avx512.h"

#include "x86/fake_quant_simd.h"

namespace kdq {

extern const FakeQuantKernels kFakeQuantAvx512 = make_fake_quant_kernels<Loops>();

}  // namespace kdq
