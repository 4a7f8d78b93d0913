// torch.ops.kdq: the numbers of static activations, of the int8 family and of bit planes.
#pragma once

#include "kdq/int8_gemm.h"
#include "layer_args.h"
#include "torch_common.h"

namespace kdq::bindings {

// A layer's arguments, of which numbers may be on a GPU.
struct LayerCall {
  Int8Linear args;
  OptionalTensor input_scale;       // on the device, where they count instead of the numbers in args
  OptionalTensor input_zero_point;  // likewise
};

// A tensor of one element.
template <class On>
Tensor expect_scalar(const On& on, const char* name, const Tensor& t, ScalarType type) {
  const Tensor value = expect(on, name, t, type);
  if (value.numel() != 1) {
    invalid(std::string(name) + ": expected one element, got shape " + to_string(sizes_of(t)));
  }
  return value;
}

template <class On>
int64_t integer_scalar(const On& on, const char* name, const Tensor& t) {
  if (has_dtype(t, ScalarType::Long)) return *data<int64_t>(expect_scalar(on, name, t, ScalarType::Long));
  return *data<int32_t>(expect_scalar(on, name, t, ScalarType::Int));
}

// On the CPU.
template <class On>
void static_input_of(const On& on, const OptionalTensor& input_scale, const OptionalTensor& input_zero_point,
                     int64_t input_quant_max, LayerCall* call) {
  std::optional<float> step;
  OptionalInt zero_point;
  if (input_scale) step = *data<float>(expect_scalar(on, "input_scale", *input_scale, ScalarType::Float));
  if (input_zero_point) zero_point = integer_scalar(on, "input_zero_point", *input_zero_point);
  check(set_static_input(step, zero_point, input_quant_max, &call->args));
}

}  // namespace kdq::bindings
