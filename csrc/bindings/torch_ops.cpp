// libkdq_torch: the schemas of torch.ops.kdq.* and their CPU implementations. Fake (meta) implementations and autograd
// are registered from Python, in kdq_kernels/_torch_library.py.
#include "torch_ops.h"

namespace kdq::bindings {

STABLE_TORCH_LIBRARY(kdq, m) {
  m.def(
      "fake_quantize(Tensor x, Tensor scale, Tensor? zero_point, int quant_min, int quant_max, int? axis=None, "
      "int? group_size=None) -> Tensor");
  m.def(
      "fake_quantize.out(Tensor x, Tensor scale, Tensor? zero_point, int quant_min, int quant_max, int? axis=None, "
      "int? group_size=None, *, Tensor(a!) out) -> ()");
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, int quant_min, int quant_max, "
      "int? axis=None, int? group_size=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "fake_quantize_backward_(Tensor(a!) grad, Tensor x, Tensor scale, Tensor? zero_point, int quant_min, "
      "int quant_max, int? axis=None) -> (Tensor, Tensor)");
  m.def(
      "quantize(Tensor x, Tensor scale, Tensor? zero_point, int quant_min, int quant_max, int? axis=None, "
      "int? group_size=None) -> Tensor");
  m.def("dequantize(Tensor q, Tensor scale, Tensor? zero_point, int? axis=None, int? group_size=None) -> Tensor");
  m.def("quantize_rows(Tensor x) -> (Tensor, Tensor)");
  m.def("fake_quantize_rows(Tensor x) -> Tensor");
  m.def("binarize_rows(Tensor x) -> (Tensor, Tensor)");
  m.def("binarize_rows_backward(Tensor? grad_signs, Tensor? grad_mean, Tensor x) -> Tensor");
  m.def("binarize_rows_backward_(Tensor(a!) grad, Tensor x, bool scaled) -> ()");

  m.def("pack_int8_weight(Tensor w) -> Tensor");
  m.def("unpack_int8_weight(Tensor packed) -> Tensor");
  m.def("int8_matmul(Tensor a, Tensor b) -> Tensor");
  m.def(
      "int8_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias=None, Tensor? input_scale=None, "
      "Tensor? input_zero_point=None, int input_quant_max=255, str? activation=None) -> Tensor");
  m.def(
      "int8_weight_only_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias=None, "
      "str? activation=None) -> Tensor");

  m.def("pack_signs(Tensor x) -> Tensor");
  m.def("unpack_signs(Tensor bits, int k) -> Tensor");
  m.def("binary_matmul(Tensor a_bits, Tensor b_bits, int k) -> Tensor");
  m.def("binary_linear(Tensor x, Tensor weight_bits, Tensor weight_scale, Tensor? bias=None, int? k=None) -> Tensor");
  m.def("binary_threshold(Tensor x, Tensor weight_bits, Tensor threshold, int? k=None) -> Tensor");

  m.def("pack_indices(Tensor indices, int bits) -> Tensor");
  m.def("unpack_indices(Tensor packed, int bits, int n, int k) -> Tensor");
  m.def(
      "codebook_linear(Tensor x, Tensor packed, Tensor codebook, int out_features, Tensor? bias=None, "
      "str? activation=None) -> Tensor");

  m.def(
      "distillation_loss(Tensor student, Tensor teacher, Tensor? target, float temperature, float alpha) -> "
      "(Tensor, Tensor)");
  m.def(
      "distillation_loss_backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? target, "
      "Tensor statistics, float temperature, float alpha) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdq, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize_op));
  m.impl("fake_quantize.out", TORCH_BOX(&fake_quantize_out_op));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward_op));
  m.impl("fake_quantize_backward_", TORCH_BOX(&fake_quantize_backward_inplace_op));
  m.impl("quantize", TORCH_BOX(&quantize_op));
  m.impl("dequantize", TORCH_BOX(&dequantize_op));
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows_op));
  m.impl("fake_quantize_rows", TORCH_BOX(&fake_quantize_rows_op));
  m.impl("binarize_rows", TORCH_BOX(&binarize_rows_op));
  m.impl("binarize_rows_backward", TORCH_BOX(&binarize_rows_backward_op));
  m.impl("binarize_rows_backward_", TORCH_BOX(&binarize_rows_backward_inplace_op));
  m.impl("pack_int8_weight", TORCH_BOX(&pack_int8_weight_op));
  m.impl("unpack_int8_weight", TORCH_BOX(&unpack_int8_weight_op));
  m.impl("int8_matmul", TORCH_BOX(&int8_matmul_op));
  m.impl("int8_linear", TORCH_BOX(&int8_linear_op));
  m.impl("int8_weight_only_linear", TORCH_BOX(&int8_weight_only_linear_op));
  m.impl("pack_signs", TORCH_BOX(&pack_signs_op));
  m.impl("unpack_signs", TORCH_BOX(&unpack_signs_op));
  m.impl("binary_matmul", TORCH_BOX(&binary_matmul_op));
  m.impl("binary_linear", TORCH_BOX(&binary_linear_op));
  m.impl("binary_threshold", TORCH_BOX(&binary_threshold_op));
  m.impl("pack_indices", TORCH_BOX(&pack_indices_op));
  m.impl("unpack_indices", TORCH_BOX(&unpack_indices_op));
  m.impl("codebook_linear", TORCH_BOX(&codebook_linear_op));
  m.impl("distillation_loss", TORCH_BOX(&distillation_loss_op));
  m.impl("distillation_loss_backward", TORCH_BOX(&distillation_loss_backward_op));
}

}  // namespace kdq::bindings
