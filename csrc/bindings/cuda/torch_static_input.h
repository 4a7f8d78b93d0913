// The numbers of static activations where they may be on the GPU of x, or on the CPU. Those on the GPU stay there,
// unread: reading them would wait for it. They count as in range.
#pragma once

#include "cuda/torch_cuda.h"
#include "torch_static_input.h"

namespace kdq::bindings {

// Where numbers may be beside the GPU.
struct Host {
  static bool has(const Tensor& t) { return t.is_cpu(); }
  static std::string kind() { return "a tensor on the CPU or on a GPU"; }
};

// int32, which the kernels read; torch's own quantizers have int64.
inline Tensor zero_point_on(const Cuda& on, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Long) return expect_scalar(on, "input_zero_point", t, ScalarType::Int);
  const Tensor narrow = empty(on, sizes_of(t), ScalarType::Int);
  copy(expect_scalar(on, "input_zero_point", t, ScalarType::Long), narrow);
  return narrow;
}

inline void static_input_of(const Cuda& on, const OptionalTensor& input_scale, const OptionalTensor& input_zero_point,
                            int64_t input_quant_max, LayerCall* call) {
  std::optional<float> step;
  OptionalInt zero_point;
  if (input_scale && input_scale->is_cuda()) {
    call->input_scale = expect_scalar(on, "input_scale", *input_scale, ScalarType::Float);
    step = 1.0F;
  } else if (input_scale) {
    step = *data<float>(expect_scalar(Host(), "input_scale", *input_scale, ScalarType::Float));
  }
  if (input_zero_point && input_zero_point->is_cuda()) {
    call->input_zero_point = zero_point_on(on, *input_zero_point);
    zero_point = 0;
  } else if (input_zero_point) {
    zero_point = integer_scalar(Host(), "input_zero_point", *input_zero_point);
  }
  check(set_static_input(step, zero_point, input_quant_max, &call->args));
}

}  // namespace kdq::bindings
