// The distillation loss on AVX2.
#include "x86/vec_avx2.h"

#include "x86/distillation_simd.h"

namespace kdq {

extern const DistillationKernels kDistillationAvx2 = make_distillation_kernels<Loops>();

}  // namespace kdq
