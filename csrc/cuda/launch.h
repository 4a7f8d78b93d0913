// Kernels as objects, and their launch on a stream. A kernel is a struct with its arguments as members, a constant
// kThreads, a type Shared for its shared memory, and
//   template <class Thread> KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const;
// Functions that launch are templates on the launcher, for whose place the tests have another one: the choice of
// kernels, blocks and arguments is so tested too.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/thread.h"
#include "kdq/cuda.h"

namespace kdq::cuda {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) run_kernel(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  GpuThread thread;
  kernel(thread, shared);
}

inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  const std::string message = std::string("CUDA: ") + cudaGetErrorString(error);
  const bool cannot = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver ||
                      error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
  return cannot ? Status::unsupported(message) : Status::internal(message);
}

class StreamLauncher {
 public:
  explicit StreamLauncher(Stream stream) : stream_(stream) {}

  // Without blocks nothing is launched.
  template <class Kernel>
  Status run(const Kernel& kernel, int64_t blocks) const {
    if (blocks == 0) return {};
    if (blocks > INT32_MAX) return Status::invalid("shape: too large for one launch");
    run_kernel<<<static_cast<unsigned>(blocks), Kernel::kThreads, 0, stream_>>>(kernel);
    return status_of(cudaGetLastError());
  }

 private:
  Stream stream_;
};

}  // namespace kdq::cuda
