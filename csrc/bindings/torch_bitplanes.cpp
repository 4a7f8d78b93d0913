// torch.ops.kdq: bit planes on CPU tensors. See torch_bitplanes.h.
#include "torch_bitplanes.h"

#include "torch_cpu.h"

namespace kdq::bindings {
namespace {

class PlanesOnCpu : public Cpu {
 public:
  using Cpu::Cpu;

  template <class... Args>
  static Status pack_bitplanes(const Args&... args) {
    return kdq::pack_bitplanes(args..., torch_executor());
  }
  template <class... Args>
  static Status unpack_bitplanes(const Args&... args) {
    return kdq::unpack_bitplanes(args..., torch_executor());
  }
  template <class... Args>
  static Status bitplane_matmul(const Args&... args) {
    return kdq::bitplane_matmul(args..., torch_executor());
  }

  void static_input(const OptionalTensor& input_scale, const OptionalTensor& input_zero_point, int64_t input_quant_max,
                    LayerCall* call) const {
    static_input_of(*this, input_scale, input_zero_point, input_quant_max, call);
  }

  // call: with the grid, which args have too.
  static Status plane_linear(const BitplaneLinear& args, const LayerCall&) {
    return bitplane_linear(args, torch_executor());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdq, CPU, m) { register_bitplanes<PlanesOnCpu>(m); }

}  // namespace kdq::bindings
