// torch.ops.kdq: attention on CPU tensors.
#include "torch_attention.h"

#include "torch_cpu.h"

namespace kdq::bindings {

STABLE_TORCH_LIBRARY_IMPL(kdq, CPU, m) { register_attention<Cpu>(m); }

}  // namespace kdq::bindings
