// torch.ops.kdq: the codebook family on CPU tensors.
#include "torch_codebook.h"

#include "torch_cpu.h"

namespace kdq::bindings {

STABLE_TORCH_LIBRARY_IMPL(kdq, CPU, m) { register_codebook<Cpu>(m); }

}  // namespace kdq::bindings
