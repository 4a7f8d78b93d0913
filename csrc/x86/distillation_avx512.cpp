// The distillation loss on AVX-512.
#include "x86/vec_avx512.h"

#include "x86/distillation_simd.h"

namespace kdq {

extern const DistillationKernels kDistillationAvx512 = make_distillation_kernels<Loops>();

}  // namespace kdq
