// torch.ops.kdq: the distillation loss on CPU tensors.
#include "torch_distillation.h"

#include "torch_cpu.h"

namespace kdq::bindings {

STABLE_TORCH_LIBRARY_IMPL(kdq, CPU, m) { register_distillation<Cpu>(m); }

}  // namespace kdq::bindings
