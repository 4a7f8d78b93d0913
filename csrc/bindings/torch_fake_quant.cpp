// torch.ops.kdq: the fake-quant family on CPU tensors.
#include "torch_fake_quant.h"

#include "torch_cpu.h"

namespace kdq::bindings {

STABLE_TORCH_LIBRARY_IMPL(kdq, CPU, m) { register_fake_quant<Cpu>(m); }

}  // namespace kdq::bindings
