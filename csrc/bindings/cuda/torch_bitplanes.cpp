// torch.ops.kdq: bit planes on CUDA tensors. See torch_bitplanes.h.
#include "torch_bitplanes.h"

#include "cuda/torch_static_input.h"

namespace kdq::bindings {
namespace {

class PlanesOnCuda : public Cuda {
 public:
  using Cuda::Cuda;

  template <class... Args>
  Status pack_bitplanes(const Args&... args) const {
    return cuda::pack_bitplanes(args..., stream());
  }
  template <class... Args>
  Status unpack_bitplanes(const Args&... args) const {
    return cuda::unpack_bitplanes(args..., stream());
  }
  Status bitplane_matmul(const PlaneMatrix& a, const PlaneMatrix& b, int64_t k, int32_t* out) const {
    const Tensor scratch = workspace(cuda::bitplane_matmul_workspace(a.rows, b.rows));
    return cuda::bitplane_matmul(a, b, k, out, scratch.mutable_data_ptr(), stream());
  }

  void static_input(const OptionalTensor& input_scale, const OptionalTensor& input_zero_point, int64_t input_quant_max,
                    LayerCall* call) const {
    static_input_of(static_cast<const Cuda&>(*this), input_scale, input_zero_point, input_quant_max, call);
  }

  Status plane_linear(const BitplaneLinear& layer, const LayerCall& call) const {
    const Tensor scratch = workspace(cuda::bitplane_linear_workspace(layer.m, layer.k, layer.input_quant_max));
    cuda::BitplaneLinear args;
    args.layer = layer;
    args.workspace = scratch.mutable_data_ptr();
    args.input_scale_at = call.input_scale ? data<float>(*call.input_scale) : nullptr;
    args.input_zero_point_at = call.input_zero_point ? data<int32_t>(*call.input_zero_point) : nullptr;
    return cuda::bitplane_linear(args, stream());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdq, CUDA, m) { register_bitplanes<PlanesOnCuda>(m); }

}  // namespace kdq::bindings
