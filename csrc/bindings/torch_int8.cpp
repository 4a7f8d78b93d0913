// torch.ops.kdq: the int8 family on CPU tensors. A packed weight is the opaque blob of kdq/int8_gemm.h, uint8.
#include "torch_int8.h"

#include "torch_cpu.h"

namespace kdq::bindings {
namespace {

class Int8OnCpu : public Cpu {
 public:
  using Cpu::Cpu;

  Tensor pack(const Tensor& w, int bits = 8) const {
    Sizes sizes;
    check(packed_tensor_sizes(w.size(0), w.size(1), bits, &sizes));
    const Tensor packed = empty(*this, sizes, ScalarType::Byte);
    if (w.size(0) > 0) {
      check(pack_int8_weight(data<int8_t>(w), w.size(0), w.size(1), packed.mutable_data_ptr(),
                             static_cast<size_t>(packed.numel()), torch_executor(), bits));
    }
    return packed;
  }

  Packed open(const char* name, const Tensor& packed) const {
    Packed p{expect(*this, name, packed, ScalarType::Byte, 2), {}};
    check(packed_array_shape(p.blob.const_data_ptr(), p.blob.size(0), p.blob.size(1), &p.shape));
    return p;
  }

  Packed open_factor(const char* name, const Tensor& b) const {
    const bool plain = b.scalar_type() == ScalarType::Char;
    return open(name, plain ? pack(expect(*this, name, b, ScalarType::Char, 2)) : b);
  }

  Tensor unpack(const Packed& packed) const {
    const Tensor w = empty(*this, {packed.shape.n, packed.shape.k}, ScalarType::Char);
    if (packed.shape.n > 0) {
      check(unpack_int8_weight(packed.data(), packed.bytes(), mutable_data<int8_t>(w), torch_executor()));
    }
    return w;
  }

  Status multiply(const Tensor& a, const Packed& packed, const Tensor& out) const {
    return int8_matmul(data<int8_t>(a), a.size(0), a.size(1), packed.data(), packed.bytes(), mutable_data<int32_t>(out),
                       torch_executor());
  }

  void static_input(const OptionalTensor& input_scale, const OptionalTensor& input_zero_point, int64_t input_quant_max,
                    LayerCall* call) const {
    static_input_of(*this, input_scale, input_zero_point, input_quant_max, call);
  }

  Status linear(const LinearCall& call) const { return int8_linear(call.args, torch_executor()); }
  Status weight_only(const LinearCall& call) const { return int8_weight_only_linear(call.args, torch_executor()); }
  Status convolution(const Conv2dShape& shape, const LinearCall& call) const {
    return int8_conv2d({shape, call.args}, torch_executor());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdq, CPU, m) { register_int8<Int8OnCpu>(m); }

}  // namespace kdq::bindings
