// torch.ops.kdq: the codebook family on CUDA tensors.
#include "torch_codebook.h"

#include "cuda/torch_cuda.h"

namespace kdq::bindings {

STABLE_TORCH_LIBRARY_IMPL(kdq, CUDA, m) { register_codebook<Cuda>(m); }

}  // namespace kdq::bindings
