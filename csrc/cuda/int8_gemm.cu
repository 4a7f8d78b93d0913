// The int8 family on a GPU: the public functions.
#include "cuda/int8_gemm.h"

#include "cuda/float_linear.h"
#include "cuda/launch.h"

namespace kdq::cuda {

size_t int8_matmul_workspace(int64_t m, int64_t n, int64_t k) { return partial_bytes(m, n, k); }

Status int8_matmul(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k, int32_t* out, void* workspace,
                   Stream stream) {
  return launch_int8_matmul(StreamLauncher(stream), a, b, m, n, k, out, workspace);
}

size_t int8_linear_workspace(int64_t m, int64_t n, int64_t k) { return linear_workspace_bytes(m, n, k); }

Status int8_linear(const Int8Linear& args, Stream stream) { return launch_int8_linear(StreamLauncher(stream), args); }

Status int8_weight_only_linear(const Int8Linear& args, Stream stream) {
  return launch_weight_only_linear(StreamLauncher(stream), args);
}

}  // namespace kdq::cuda
