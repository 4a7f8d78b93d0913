// The CUDA library through its public header alone, without a GPU: what is wrong is refused, what is empty is done.
#include "kdq/cuda.h"

#include <cstdio>

int main() {
  const kdq::Status refused = kdq::cuda::int8_matmul(nullptr, nullptr, 1, 1, 1, nullptr, nullptr, nullptr);
  const kdq::Status empty = kdq::cuda::quantize_rows(kdq::DType::kFloat32, nullptr, 0, 8, nullptr, nullptr, nullptr);
  std::printf("%s\n", refused.message().c_str());
  const bool right = refused.code() == kdq::StatusCode::kInvalidArgument && empty.ok() &&
                     kdq::cuda::fake_quantize_backward_workspace({1, 1, 5000}) > 0;
  return right ? 0 : 1;
}
