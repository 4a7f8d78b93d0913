// One op of each family through the public headers, compared with the reference level. Exits 0 when all agree.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "kdq/kdq.h"

namespace {

void require(const kdq::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

std::vector<float> ramp(size_t n) {
  std::vector<float> values(n);
  for (size_t i = 0; i < n; ++i) values[i] = static_cast<float>((i * 7919) % 2003) / 1001.0F - 1.0F;
  return values;
}

std::vector<float> run_fake_quant() {
  const std::vector<float> x = ramp(5 * 33);
  std::vector<float> y(x.size());
  const std::vector<float> scale = {0.1F, 0.2F, 0.05F, 0.3F, 0.15F};
  kdq::QuantGrid grid;
  grid.scale = scale.data();
  grid.quant_min = -8;
  grid.quant_max = 7;
  require(kdq::fake_quantize(kdq::DType::kFloat32, x.data(), y.data(), {1, 5, 33}, grid, kdq::default_executor()));
  return y;
}

std::vector<int32_t> run_int8() {
  const int64_t m = 9;
  const int64_t n = 37;
  const int64_t k = 131;
  std::vector<int8_t> a(m * k);
  std::vector<int8_t> w(n * k);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<int8_t>(i * 37);
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<int8_t>(i * 101);
  size_t bytes = 0;
  require(kdq::int8_packed_bytes(n, k, &bytes));
  std::vector<char> packed(bytes);
  require(kdq::pack_int8_weight(w.data(), n, k, packed.data(), bytes, kdq::default_executor()));
  std::vector<int32_t> out(m * n);
  require(kdq::int8_matmul(a.data(), m, k, packed.data(), bytes, out.data(), kdq::default_executor()));
  return out;
}

std::vector<int32_t> run_binary() {
  const int64_t m = 9;
  const int64_t n = 21;
  const int64_t k = 300;
  const std::vector<float> a = ramp(m * k);
  const std::vector<float> b = ramp(n * k + 17);
  std::vector<uint64_t> a_bits(m * kdq::binary_words(k));
  std::vector<uint64_t> b_bits(n * kdq::binary_words(k));
  require(kdq::pack_signs(kdq::DType::kFloat32, a.data(), m, k, a_bits.data(), kdq::default_executor()));
  require(kdq::pack_signs(kdq::DType::kFloat32, b.data() + 17, n, k, b_bits.data(), kdq::default_executor()));
  std::vector<int32_t> out(m * n);
  require(kdq::binary_matmul(a_bits.data(), b_bits.data(), m, n, k, out.data(), kdq::default_executor()));
  return out;
}

std::vector<int32_t> run_bitplanes() {
  const int64_t m = 9;
  const int64_t n = 21;
  const int64_t k = 300;
  const int bits = 2;
  std::vector<uint8_t> a(m * k);
  std::vector<int8_t> b(n * k);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<uint8_t>(i * 7 % 4);
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<int8_t>(static_cast<int>(i * 5 % 4) - 2);
  std::vector<uint64_t> a_planes(bits * m * kdq::binary_words(k));
  std::vector<uint64_t> b_planes(bits * n * kdq::binary_words(k));
  const kdq::PlaneForm forms[] = {kdq::PlaneForm::kUnsigned, kdq::PlaneForm::kSigned};
  require(kdq::pack_bitplanes(a.data(), m, k, bits, forms[0], a_planes.data(), kdq::default_executor()));
  require(kdq::pack_bitplanes(b.data(), n, k, bits, forms[1], b_planes.data(), kdq::default_executor()));
  std::vector<int32_t> out(m * n);
  require(kdq::bitplane_matmul({a_planes.data(), m, bits, forms[0]}, {b_planes.data(), n, bits, forms[1]}, k,
                               out.data(), kdq::default_executor()));
  return out;
}

std::vector<float> run_codebook() {
  const int64_t n = 37;
  const int64_t k = 131;
  const int bits = 5;
  std::vector<uint8_t> indices(n * k);
  std::vector<float> codebook(1 << bits);
  std::vector<float> x(k);
  for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<uint8_t>(i * 37 % 32);
  for (size_t i = 0; i < codebook.size(); ++i) codebook[i] = static_cast<float>(i) - 16.0F;
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 19) - 9.0F;  // integers, so that sums are exact
  std::vector<uint32_t> packed(kdq::codebook_panels(n) * kdq::codebook_words(k, bits) * kdq::kCodebookLanes);
  require(kdq::pack_indices(indices.data(), n, k, bits, packed.data(), kdq::default_executor()));
  std::vector<float> y(n);
  kdq::CodebookLinear args;
  args.x = x.data();
  args.y = y.data();
  args.m = 1;
  args.n = n;
  args.k = k;
  args.packed = packed.data();
  args.bits = bits;
  args.codebook = codebook.data();
  require(kdq::codebook_linear(args, kdq::default_executor()));
  return y;
}

std::vector<uint64_t> run_binary_threshold() {
  const int64_t m = 9;
  const int64_t n = 70;
  const int64_t k = 300;
  const std::vector<float> x = ramp(m * k);
  const std::vector<float> w = ramp(n * k + 17);
  std::vector<uint64_t> weight_bits(n * kdq::binary_words(k));
  require(kdq::pack_signs(kdq::DType::kFloat32, w.data() + 17, n, k, weight_bits.data(), kdq::default_executor()));
  std::vector<int32_t> threshold(n);
  for (int64_t c = 0; c < n; ++c) threshold[c] = static_cast<int32_t>(c % 7) - 3;
  std::vector<uint64_t> y_bits(m * kdq::binary_words(n));
  kdq::BinaryThreshold args;
  args.x = x.data();
  args.y_bits = y_bits.data();
  args.m = m;
  args.n = n;
  args.k = k;
  args.weight_bits = weight_bits.data();
  args.threshold = threshold.data();
  require(kdq::binary_threshold(args, kdq::default_executor()));
  return y_bits;
}

// A float result, which may differ between levels in its last digits.
std::vector<int64_t> run_distillation() {
  const int64_t classes = 1001;
  const std::vector<float> student = ramp(3 * classes);
  const std::vector<float> teacher = ramp(3 * classes + 5);
  const std::vector<int64_t> target = {7, kdq::kIgnoredTarget, 1000};
  std::vector<kdq::DistillationRow> statistics(3);
  kdq::DistillationLoss args;
  args.student = student.data();
  args.teacher = teacher.data() + 5;
  args.target = target.data();
  args.rows = 3;
  args.classes = classes;
  args.temperature = 2.0F;
  args.alpha = 0.5F;
  float loss = 0.0F;
  require(kdq::distillation_loss(args, statistics.data(), &loss, kdq::default_executor()));
  return {std::llround(loss * 1e4)};
}

// Likewise.
std::vector<int64_t> run_attention() {
  const int64_t rows = 37;
  const int64_t size = 20;
  const std::vector<float> qkv = ramp(3 * rows * size);
  std::vector<float> y(rows * size);
  kdq::Attention args;
  args.q = qkv.data();
  args.k = qkv.data() + rows * size;
  args.v = qkv.data() + 2 * rows * size;
  args.y = y.data();
  args.q_strides.row = args.k_strides.row = args.v_strides.row = args.y_strides.row = size;
  args.batch = args.heads = args.kv_heads = 1;
  args.queries = args.keys = rows;
  args.head_size = args.value_size = size;
  args.causal = true;
  require(kdq::scaled_dot_product_attention(args, kdq::default_executor()));
  std::vector<int64_t> rounded;
  for (float value : y) rounded.push_back(std::llround(value * 1e2F));
  return rounded;
}

template <class Run>
bool same_on_every_isa(const char* name, Run run) {
  require(kdq::set_isa("reference"));
  const auto expected = run();
  bool same = true;
  for (kdq::Isa isa : kdq::available_isas()) {
    require(kdq::set_isa(kdq::isa_name(isa)));
    const bool equal = run() == expected;
    std::printf("%s %s: %s\n", name, kdq::isa_name(isa), equal ? "equal" : "DIFFERENT");
    same = same && equal;
  }
  return same;
}

}  // namespace

int main() {
  const bool fake_quant = same_on_every_isa("fake_quantize", run_fake_quant);
  const bool int8 = same_on_every_isa("int8_matmul", run_int8);
  const bool binary = same_on_every_isa("binary_matmul", run_binary);
  const bool threshold = same_on_every_isa("binary_threshold", run_binary_threshold);
  const bool planes = same_on_every_isa("bitplane_matmul", run_bitplanes);
  const bool codebook = same_on_every_isa("codebook_linear", run_codebook);
  const bool distillation = same_on_every_isa("distillation_loss", run_distillation);
  const bool attention = same_on_every_isa("scaled_dot_product_attention", run_attention);
  const bool refused = !kdq::set_isa("mmx").ok();
  const bool exact = fake_quant && int8 && binary && threshold && planes && codebook;
  return exact && distillation && attention && refused ? 0 : 1;
}
