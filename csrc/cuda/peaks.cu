// What a GPU can do at most: the public functions.
#include "cuda/peaks.h"

#include "cuda/launch.h"

namespace kdq::cuda {

Status arithmetic_peak(PeakLoop loop, int64_t blocks, int64_t steps, float* out, int64_t* operations, Stream stream) {
  return launch_arithmetic_peak(StreamLauncher(stream), loop, blocks, steps, out, operations);
}

Status read_peak(const void* source, int64_t bytes, int64_t blocks, uint32_t* out, Stream stream) {
  return launch_read_peak(StreamLauncher(stream), source, bytes, blocks, out);
}

}  // namespace kdq::cuda
