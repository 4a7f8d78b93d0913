// torch.ops.kdq: the binary family on CUDA tensors.
#include "torch_binary.h"

#include "cuda/torch_cuda.h"

namespace kdq::bindings {

STABLE_TORCH_LIBRARY_IMPL(kdq, CUDA, m) { register_binary<Cuda>(m); }

}  // namespace kdq::bindings
