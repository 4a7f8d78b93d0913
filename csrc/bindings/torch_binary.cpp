// torch.ops.kdq: the binary family on CPU tensors.
#include "torch_binary.h"

#include "torch_cpu.h"

namespace kdq::bindings {

STABLE_TORCH_LIBRARY_IMPL(kdq, CPU, m) {
  register_binary<Cpu>(m);
  m.impl("binary_conv2d", TORCH_BOX(&binary_conv2d_op<Cpu>));
}

}  // namespace kdq::bindings
