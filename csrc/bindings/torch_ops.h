// The CPU implementations of torch.ops.kdq.*, one file a family; torch_ops.cpp gives them their schemas.
#pragma once

#include <tuple>

#include "torch_common.h"

namespace kdq::bindings {

using OptionalInt = std::optional<int64_t>;

// torch_fake_quant.cpp
Tensor fake_quantize_op(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point, int64_t quant_min,
                        int64_t quant_max, OptionalInt axis, OptionalInt group_size);
void fake_quantize_out_op(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point, int64_t quant_min,
                          int64_t quant_max, OptionalInt axis, OptionalInt group_size, const Tensor& out);
std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward_op(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                             const OptionalTensor& zero_point, int64_t quant_min,
                                                             int64_t quant_max, OptionalInt axis,
                                                             OptionalInt group_size);
std::tuple<Tensor, Tensor> fake_quantize_backward_inplace_op(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                             const OptionalTensor& zero_point, int64_t quant_min,
                                                             int64_t quant_max, OptionalInt axis);
Tensor quantize_op(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point, int64_t quant_min,
                   int64_t quant_max, OptionalInt axis, OptionalInt group_size);
Tensor dequantize_op(const Tensor& q, const Tensor& scale, const OptionalTensor& zero_point, OptionalInt axis,
                     OptionalInt group_size);
std::tuple<Tensor, Tensor> quantize_rows_op(const Tensor& x);
Tensor fake_quantize_rows_op(const Tensor& x);
std::tuple<Tensor, Tensor> binarize_rows_op(const Tensor& x);
Tensor binarize_rows_backward_op(const OptionalTensor& grad_signs, const OptionalTensor& grad_mean, const Tensor& x);
void binarize_rows_backward_inplace_op(const Tensor& grad, const Tensor& x, bool scaled);

// torch_int8.cpp
Tensor pack_int8_weight_op(const Tensor& w);
Tensor unpack_int8_weight_op(const Tensor& packed);
Tensor int8_matmul_op(const Tensor& a, const Tensor& b);
Tensor int8_linear_op(const Tensor& x, const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias,
                      const OptionalTensor& input_scale, const OptionalTensor& input_zero_point,
                      int64_t input_quant_max, const std::optional<std::string>& activation);
Tensor int8_weight_only_linear_op(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                                  const OptionalTensor& bias, const std::optional<std::string>& activation);

// torch_binary.cpp
Tensor pack_signs_op(const Tensor& x);
Tensor unpack_signs_op(const Tensor& bits, int64_t k);
Tensor binary_matmul_op(const Tensor& a_bits, const Tensor& b_bits, int64_t k);
Tensor binary_linear_op(const Tensor& x, const Tensor& weight_bits, const Tensor& weight_scale,
                        const OptionalTensor& bias, OptionalInt k);
Tensor binary_threshold_op(const Tensor& x, const Tensor& weight_bits, const Tensor& threshold, OptionalInt k);

// torch_codebook.cpp
Tensor pack_indices_op(const Tensor& indices, int64_t bits);
Tensor unpack_indices_op(const Tensor& packed, int64_t bits, int64_t n, int64_t k);
Tensor codebook_linear_op(const Tensor& x, const Tensor& packed, const Tensor& codebook, int64_t out_features,
                          const OptionalTensor& bias, const std::optional<std::string>& activation);

// torch_distillation.cpp
constexpr int64_t kDistillationColumns = 5;  // what the forward pass keeps of a row
std::tuple<Tensor, Tensor> distillation_loss_op(const Tensor& student, const Tensor& teacher,
                                                const OptionalTensor& target, double temperature, double alpha);
Tensor distillation_loss_backward_op(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                                     const OptionalTensor& target, const Tensor& statistics, double temperature,
                                     double alpha);

}  // namespace kdq::bindings
