// torch.ops.kdq: the int8 family on CUDA tensors. A packed weight is the row-major int8 [n, k] itself, since the
// kernels read that; what the CPU's kernels packed is uint8, and refused.
#include "torch_int8.h"

#include "cuda/torch_static_input.h"

namespace kdq::bindings {
namespace {

class Int8OnCuda : public Cuda {
 public:
  using Cuda::Cuda;

  Packed open(const char* name, const Tensor& packed) const {
    if (packed.scalar_type() == ScalarType::Byte) {
      invalid(std::string(name) +
              ": this weight was packed for the CPU; move the int8 weight to the GPU and pack it there");
    }
    const Tensor w = expect(*this, name, packed, ScalarType::Char, 2);
    return {w, {w.size(0), w.size(1)}};
  }

  Packed open_factor(const char* name, const Tensor& b) const { return open(name, b); }

  Tensor copy_of(const Tensor& w) const {
    const Tensor result = empty(*this, sizes_of(w), ScalarType::Char);
    copy(w, result);
    return result;
  }

  // Of any bits: the kernels read int8.
  Tensor pack(const Tensor& w, int = 8) const {
    if (w.size(1) > kInt8MaxK) {
      invalid("w: K = " + std::to_string(w.size(1)) + " would overflow int32 sums; expected at most " +
              std::to_string(kInt8MaxK));
    }
    return copy_of(w);
  }

  Tensor unpack(const Packed& packed) const { return copy_of(packed.blob); }

  Status multiply(const Tensor& a, const Packed& packed, const Tensor& out) const {
    const int64_t m = a.size(0);
    const auto [n, k] = packed.shape;
    const Tensor scratch = workspace(cuda::int8_matmul_workspace(m, n, k));
    return cuda::int8_matmul(data<int8_t>(a), data<int8_t>(packed.blob), m, n, k, mutable_data<int32_t>(out),
                             scratch.mutable_data_ptr(), stream());
  }

  void static_input(const OptionalTensor& input_scale, const OptionalTensor& input_zero_point, int64_t input_quant_max,
                    LayerCall* call) const {
    static_input_of(static_cast<const Cuda&>(*this), input_scale, input_zero_point, input_quant_max, call);
  }

  Status linear(const LinearCall& call) const {
    cuda::Int8Linear args = arguments(call);
    const Tensor scratch = workspace(cuda::int8_linear_workspace(args.m, args.n, args.k));
    args.workspace = scratch.mutable_data_ptr();
    return cuda::int8_linear(args, stream());
  }

  Status weight_only(const LinearCall& call) const { return cuda::int8_weight_only_linear(arguments(call), stream()); }

  Status convolution(const Conv2dShape& shape, const LinearCall& call) const {
    cuda::Int8Conv2d args{shape, arguments(call)};
    const Tensor scratch = workspace(cuda::int8_conv2d_workspace(shape, args.layer.n));
    args.layer.workspace = scratch.mutable_data_ptr();
    return cuda::int8_conv2d(args, stream());
  }

 private:
  static cuda::Int8Linear arguments(const LinearCall& call) {
    const Int8Linear& from = call.args;
    cuda::Int8Linear args;
    args.dtype = from.dtype;
    args.x = from.x;
    args.y = from.y;
    args.m = from.m;
    args.n = call.packed.shape.n;
    args.k = from.k;
    args.weight = data<int8_t>(call.packed.blob);
    args.weight_scale = from.weight_scale;
    args.bias = from.bias;
    args.activation = from.activation;
    args.is_static = from.is_static;
    args.input_scale = from.input_scale;
    args.input_zero_point = from.input_zero_point;
    args.input_quant_max = from.input_quant_max;
    args.input_scale_at = call.input_scale ? data<float>(*call.input_scale) : nullptr;
    args.input_zero_point_at = call.input_zero_point ? data<int32_t>(*call.input_zero_point) : nullptr;
    return args;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdq, CUDA, m) { register_int8<Int8OnCuda>(m); }

}  // namespace kdq::bindings
