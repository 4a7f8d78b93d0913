// Kernels as objects, and their launch on a stream. A kernel is a struct with its arguments as members, a constant
// kThreads, a type Shared for its shared memory, and
//   template <class Thread> KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const;
// Functions that launch are templates on the launcher, for whose place the tests have another one: the choice of
// kernels, blocks and arguments is so tested too.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <string>

#include "cuda/hopper_product.h"
#include "cuda/hopper_thread.h"
#include "cuda/tensor_map.h"
#include "cuda/thread.h"
#include "kdq/cuda.h"

namespace kdq::cuda {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) run_kernel(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  GpuThread thread;
  kernel(thread, shared);
}

// All of shared memory is given at the launch, as more than 48 KiB must be.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1) run_resident_kernel(const __grid_constant__ Kernel kernel) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  HopperThread thread;
  kernel(thread, *reinterpret_cast<typename Kernel::Shared*>(memory));
#endif
}

inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  const std::string message = std::string("CUDA: ") + cudaGetErrorString(error);
  const bool cannot = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver ||
                      error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
  return cannot ? Status::unsupported(message) : Status::internal(message);
}

// Of the current device; 0 if there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
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

  // Whether the current device has what hopper_thread.h needs.
  bool is_hopper() const { return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9; }

  // Whether products go there: the GPU has it, and KDQ_CUDA_HOPPER, which is read once, says so.
  Status use_hopper(bool* use) const {
    static const char* const value = std::getenv("KDQ_CUDA_HOPPER");
    const Status status = parse_use_hopper(value, use);
    *use = *use && is_hopper();
    return status;
  }

  Status tensor_map(const Operand& rows, int box_rows, TensorMap* map) const {
    return encode_rows(rows, box_rows, map);
  }

  // A kernel for hopper_thread.h, a block a multiprocessor, but no more than `most`.
  template <class Kernel>
  Status run_resident(const Kernel& kernel, int64_t most) const {
    if (!is_hopper()) return Status::unsupported("CUDA: expected a GPU of compute capability 9.0");
    const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
    constexpr int kBytes = sizeof(typename Kernel::Shared);
    const Status status = status_of(
        cudaFuncSetAttribute(run_resident_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    if (!status.ok()) return status;
    const auto blocks = static_cast<unsigned>(most < multiprocessors ? most : multiprocessors);
    run_resident_kernel<<<blocks, Kernel::kThreads, kBytes, stream_>>>(kernel);
    return status_of(cudaGetLastError());
  }

 private:
  Stream stream_;
};

}  // namespace kdq::cuda
