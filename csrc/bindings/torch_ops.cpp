// libkdq_torch: the schemas of torch.ops.kdq.*. Implementations are registered by the families' own files, here for
// the CPU and in cuda/ for CUDA; fake (meta) ones and autograd from Python, in kdq_kernels/_torch_library/.
#include <torch/csrc/stable/library.h>

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

  m.def("pack_int8_weight(Tensor w, int bits=8) -> Tensor");
  m.def("unpack_int8_weight(Tensor packed) -> Tensor");
  m.def("int8_matmul(Tensor a, Tensor b) -> Tensor");
  m.def(
      "int8_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias=None, Tensor? input_scale=None, "
      "Tensor? input_zero_point=None, int input_quant_max=255, str? activation=None) -> Tensor");
  m.def(
      "int8_linear_chain(Tensor x, Tensor[] packed, Tensor[] weight_scale, Tensor?[] bias, Tensor?[] input_scale, "
      "Tensor?[] input_zero_point, int[] input_quant_max, str[] activation) -> Tensor");
  m.def(
      "int8_weight_only_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias=None, "
      "str? activation=None) -> Tensor");

  m.def(
      "int8_conv2d(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, Tensor? input_scale=None, Tensor? input_zero_point=None, "
      "int input_quant_max=255, str? activation=None) -> Tensor");

  m.def("pack_signs(Tensor x) -> Tensor");
  m.def("unpack_signs(Tensor bits, int k) -> Tensor");
  m.def("binary_matmul(Tensor a_bits, Tensor b_bits, int k) -> Tensor");
  m.def("binary_linear(Tensor x, Tensor weight_bits, Tensor weight_scale, Tensor? bias=None, int? k=None) -> Tensor");
  m.def(
      "binary_conv2d(Tensor x, Tensor weight_bits, Tensor weight_scale, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation) -> Tensor");
  m.def("binary_threshold(Tensor x, Tensor weight_bits, Tensor threshold, int? k=None) -> Tensor");

  m.def("pack_bitplanes(Tensor q, int bits, str form) -> Tensor");
  m.def("unpack_bitplanes(Tensor planes, int k, str form) -> Tensor");
  m.def("bitplane_matmul(Tensor a_planes, Tensor b_planes, int k, str a_form, str b_form) -> Tensor");
  m.def(
      "bitplane_linear(Tensor x, Tensor weight_planes, Tensor weight_sum, Tensor weight_scale, Tensor? bias, "
      "Tensor input_scale, Tensor? input_zero_point, int input_quant_max, str weight_form, str? activation=None) -> "
      "Tensor");

  m.def("pack_indices(Tensor indices, int bits) -> Tensor");
  m.def("unpack_indices(Tensor packed, int bits, int n, int k) -> Tensor");
  m.def(
      "codebook_linear(Tensor x, Tensor packed, Tensor codebook, int out_features, Tensor? bias=None, "
      "str? activation=None) -> Tensor");

  m.def(
      "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
      "float scale) -> Tensor");

  m.def(
      "distillation_loss(Tensor student, Tensor teacher, Tensor? target, float temperature, float alpha) -> "
      "(Tensor, Tensor)");
  m.def(
      "distillation_loss_backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? target, "
      "Tensor statistics, float temperature, float alpha) -> Tensor");
}
