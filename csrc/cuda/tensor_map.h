// Tensor maps, which tell the copy engine what lies in global memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <string>

#include "cuda/hopper_thread.h"
#include "cuda/product.h"

namespace kdq::cuda {

// The driver's function is asked for at run time: libcuda is not linked, so that the library loads without a driver.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  const bool ok = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return ok ? reinterpret_cast<EncodeTiled>(function) : nullptr;
}

// Boxes of box_rows rows of kTileRowBytes bytes; zeros where they leave the operand.
inline Status encode_rows(const Operand& rows, int box_rows, TensorMap* map) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap), "its place");
  static const EncodeTiled encode = find_encode_tiled();
  if (encode == nullptr) return Status::unsupported("CUDA: the driver has no cuTensorMapEncodeTiled");
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(rows.row_bytes), static_cast<cuuint64_t>(rows.rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(rows.row_bytes)};
  const cuuint32_t box[2] = {kTileRowBytes, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[2] = {1, 1};
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<uint8_t*>(rows.data),
             size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return Status::internal("CUDA: cuTensorMapEncodeTiled failed with " + std::to_string(result));
}

}  // namespace kdq::cuda
