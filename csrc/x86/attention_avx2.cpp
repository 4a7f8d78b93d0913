// Attention on AVX2.
#include "x86/vec_avx2.h"

#include "x86/attention_simd.h"

namespace kdq {

extern const AttentionKernels kAttentionAvx2 = make_attention_kernels<AttentionLoops>();

}  // namespace kdq
