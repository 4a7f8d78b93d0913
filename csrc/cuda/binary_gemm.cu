// The public functions of the binary family on a GPU.
#include "cuda/binary_gemm.h"

#include "cuda/launch.h"

namespace kdq::cuda {

Status pack_signs(DType dtype, const void* x, int64_t rows, int64_t k, uint64_t* bits, Stream stream) {
  return launch_pack_signs(StreamLauncher(stream), dtype, x, rows, k, bits);
}

Status unpack_signs(const uint64_t* bits, int64_t rows, int64_t k, float* x, Stream stream) {
  return launch_unpack_signs(StreamLauncher(stream), bits, rows, k, x);
}

Status binary_matmul(const uint64_t* a_bits, const uint64_t* b_bits, int64_t m, int64_t n, int64_t k, int32_t* out,
                     Stream stream) {
  return launch_binary_matmul(StreamLauncher(stream), a_bits, b_bits, m, n, k, out);
}

size_t binary_layer_workspace(int64_t m, int64_t k) { return static_cast<size_t>(m * binary_row_bytes(k)); }

Status binary_linear(const BinaryLinear& args, void* workspace, Stream stream) {
  return launch_binary_linear(StreamLauncher(stream), args, workspace);
}

Status binary_threshold(const BinaryThreshold& args, void* workspace, Stream stream) {
  return launch_binary_threshold(StreamLauncher(stream), args, workspace);
}

}  // namespace kdq::cuda
