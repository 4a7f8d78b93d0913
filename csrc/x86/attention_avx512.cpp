// Attention on AVX-512.
#include "x86/vec_avx512.h"

#include "x86/attention_simd.h"

namespace kdq {

extern const AttentionKernels kAttentionAvx512 = make_attention_kernels<AttentionLoops>();

}  // namespace kdq
