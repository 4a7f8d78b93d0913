// torch.ops.kdq: the fake-quant family on CUDA tensors.
#include "torch_fake_quant.h"

#include "cuda/torch_cuda.h"

namespace kdq::bindings {

STABLE_TORCH_LIBRARY_IMPL(kdq, CUDA, m) { register_fake_quant<Cuda>(m); }

}  // namespace kdq::bindings
