// torch.ops.kdq: the binary family on CPU tensors.
#include "torch_binary.h"

#include "torch_cpu.h"

namespace kdq::bindings {

STABLE_TORCH_LIBRARY_IMPL(kdq, CPU, m) { register_binary<Cpu>(m); }

}  // namespace kdq::bindings
