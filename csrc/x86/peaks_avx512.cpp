// Peak loops on AVX-512 without VNNI.
#include "x86/peaks_avx512.h"

namespace kdq {

extern const PeakKernels kPeaksAvx512 = {run_peak<Int8Maddwd>, run_peak<BinaryTable>, run_peak<Float32>};

}  // namespace kdq
