// The codebook family on a GPU: the public functions.
#include "cuda/codebook.h"

#include "cuda/launch.h"

namespace kdq::cuda {

Status pack_indices(const uint8_t* indices, int64_t n, int64_t k, int bits, uint32_t* packed, Stream stream) {
  return launch_pack_indices(StreamLauncher(stream), indices, n, k, bits, packed);
}

Status unpack_indices(const uint32_t* packed, int64_t n, int64_t k, int bits, uint8_t* indices, Stream stream) {
  return launch_unpack_indices(StreamLauncher(stream), packed, n, k, bits, indices);
}

Status codebook_linear(const CodebookLinear& args, Stream stream) {
  return launch_codebook_linear(StreamLauncher(stream), args);
}

}  // namespace kdq::cuda
