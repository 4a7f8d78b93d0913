// torch.ops.kdq: the distillation loss on CUDA tensors.
#include "torch_distillation.h"

#include "cuda/torch_cuda.h"

namespace kdq::bindings {

STABLE_TORCH_LIBRARY_IMPL(kdq, CUDA, m) { register_distillation<Cuda>(m); }

}  // namespace kdq::bindings
