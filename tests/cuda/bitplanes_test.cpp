// Bit planes for GPUs against the reference.
#include "cuda/bitplanes.h"
#include "products.h"

namespace kdq::test {
namespace {

constexpr PlaneForm kForms[] = {PlaneForm::kUnsigned, PlaneForm::kSigned, PlaneForm::kOdd};

// Integers of a form, as bytes: both ends among them.
std::vector<uint8_t> integers_of(int bits, PlaneForm form, int64_t n) {
  const PlaneCodes codes(bits, form);
  std::vector<uint8_t> q(static_cast<size_t>(n));
  for (size_t i = 0; i < q.size(); ++i) {
    const int code = i % 7 == 0 ? 0 : i % 7 == 1 ? codes.top : static_cast<int>(generator()() % (codes.top + 1U));
    q[i] = static_cast<uint8_t>(codes.integer(code));
  }
  return q;
}

struct Matrix {
  std::vector<uint64_t> planes;
  int64_t rows;
  int bits;
  PlaneForm form;

  PlaneMatrix at(const uint64_t* data) const { return {data, rows, bits, form}; }
};

Matrix matrix(int64_t rows, int64_t k, int bits, PlaneForm form) {
  const std::vector<uint8_t> q = integers_of(bits, form, rows * k);
  Matrix m = {std::vector<uint64_t>(static_cast<size_t>(bits) * words(rows, k)), rows, bits, form};
  require(pack_bitplanes(q.data(), rows, k, bits, form, m.planes.data(), serial_executor()));
  return m;
}

void test_packing(int64_t k, int bits, PlaneForm form, const Setting& setting) {
  constexpr int64_t kRows = 5;
  const std::string what = "k = " + std::to_string(k) + ", bits = " + std::to_string(bits);
  const std::vector<uint8_t> q = integers_of(bits, form, kRows * k);
  std::vector<uint64_t> expected(static_cast<size_t>(bits) * words(kRows, k));
  require(pack_bitplanes(q.data(), kRows, k, bits, form, expected.data(), serial_executor()));
  const Launcher launcher(setting.descending);
  Buffer<uint8_t> in(q, setting.place);
  Buffer<uint64_t> planes(expected.size(), setting.place);
  run_watched(planes,
              [&] { return cuda::launch_pack_bitplanes(launcher, in.data(), kRows, k, bits, form, planes.data()); });
  CHECK_SAME(planes.values(), expected, what);
  Buffer<uint8_t> out(q.size(), setting.place);
  run_watched(out,
              [&] { return cuda::launch_unpack_bitplanes(launcher, planes.data(), kRows, k, bits, form, out.data()); });
  CHECK_SAME(out.values(), q, what);
}

void test_matmul(const Size& s, int a_bits, PlaneForm a_form, int b_bits, PlaneForm b_form, const Setting& setting) {
  const Matrix a = matrix(s.m, s.k, a_bits, a_form);
  const Matrix b = matrix(s.n, s.k, b_bits, b_form);
  std::vector<int32_t> expected(static_cast<size_t>(s.m * s.n));
  require(bitplane_matmul(a.at(a.planes.data()), b.at(b.planes.data()), s.k, expected.data(), serial_executor()));
  Buffer<uint64_t> of_a(a.planes, setting.place);
  Buffer<uint64_t> of_b(b.planes, setting.place);
  Buffer<int32_t> out(expected.size(), setting.place);
  Buffer<char> workspace(cuda::plane_matmul_workspace_bytes(s.m, s.n), Place::kStart);
  run_watched(out, [&] {
    return cuda::launch_bitplane_matmul(Launcher(setting.descending), a.at(of_a.data()), b.at(of_b.data()), s.k,
                                        out.data(), workspace.data());
  });
  CHECK_SAME(out.values(), expected, name(s));
}

// on_device: the grid's numbers are there too.
template <class T>
void test_linear(const Size& s, int bits, PlaneForm form, int32_t quant_max, bool on_device, const Setting& setting) {
  constexpr float kScale = 0.37F;
  const int32_t zero_point = quant_max / 2;
  std::vector<float> values = normals(static_cast<size_t>(s.m * s.k));
  if (s.m > 1 && s.k > 0) values[static_cast<size_t>(s.k)] = NAN;  // in the second row
  const std::vector<T> x = narrowed<T>(values);
  const Matrix w = matrix(s.n, s.k, bits, form);
  std::vector<int8_t> integers(static_cast<size_t>(s.n * s.k));
  require(unpack_bitplanes(w.planes.data(), s.n, s.k, bits, form, integers.data(), serial_executor()));
  std::vector<int32_t> sums(static_cast<size_t>(s.n));
  for (size_t i = 0; i < integers.size(); ++i) sums[i / static_cast<size_t>(s.k)] += integers[i];
  std::vector<float> scale = normals(static_cast<size_t>(s.n));
  for (float& value : scale) value = std::fabs(value) + 0.01F;
  const std::vector<float> bias = normals(static_cast<size_t>(s.n));
  std::vector<T> y(static_cast<size_t>(s.m * s.n));

  Buffer<T> in(x, setting.place);
  Buffer<uint64_t> planes(w.planes, setting.place);
  Buffer<int32_t> of_sum(sums, setting.place);
  Buffer<float> of_scale(scale, setting.place);
  Buffer<float> of_bias(bias, setting.place);
  Buffer<T> out(y.size(), setting.place);
  Buffer<float> input_scale(std::vector<float>{kScale}, setting.place);
  Buffer<int32_t> input_zero_point(std::vector<int32_t>{zero_point}, setting.place);
  Buffer<char> workspace(cuda::plane_linear_workspace_bytes(s.m, s.k, planes_of(quant_max)), Place::kStart);
  cuda::BitplaneLinear args;
  kdq::BitplaneLinear& layer = args.layer;
  layer = {dtype_of<T>(), x.data(),
           y.data(),      s.m,
           s.k,           w.at(w.planes.data()),
           sums.data(),   scale.data(),
           bias.data(),   Activation::kRelu,
           kScale,        zero_point,
           quant_max};
  require(bitplane_linear(layer, serial_executor()));
  layer.x = in.data();
  layer.y = out.data();
  layer.weight.planes = planes.data();
  layer.weight_sum = of_sum.data();
  layer.weight_scale = of_scale.data();
  layer.bias = of_bias.data();
  args.workspace = workspace.data();
  if (on_device) {
    args.input_scale_at = input_scale.data();
    args.input_zero_point_at = input_zero_point.data();
    layer.input_scale = NAN;
    layer.input_zero_point = -1;
  }
  run_watched(out, [&] { return cuda::launch_bitplane_linear(Launcher(setting.descending), args); });
  CHECK_SAME(out.values(), y, name(s));
}

void test_refusals() {
  const Launcher launcher(false);
  int32_t out = 0;
  uint64_t planes[16] = {};
  const PlaneMatrix a = {planes, 1, 2, PlaneForm::kUnsigned};
  const PlaneMatrix wide = {planes, 1, 8, PlaneForm::kSigned};
  refuses("a_planes:", cuda::launch_bitplane_matmul(launcher, {nullptr, 1, 2}, a, 3, &out, &out));
  refuses("b_planes:", cuda::launch_bitplane_matmul(launcher, a, {planes, 1, 8, PlaneForm::kOdd}, 3, &out, &out));
  refuses("k:", cuda::launch_bitplane_matmul(launcher, wide, wide, 65537, &out, &out));
  refuses("workspace:", cuda::launch_bitplane_matmul(launcher, a, a, 3, &out, nullptr));
  refuses("bits:", cuda::launch_pack_bitplanes(launcher, planes, 1, 1, 9, PlaneForm::kSigned, planes));
  refuses("q:", cuda::launch_unpack_bitplanes(launcher, planes, 1, 1, 2, PlaneForm::kSigned, nullptr));
  cuda::BitplaneLinear args;
  args.layer.m = args.layer.k = 1;
  args.layer.weight = a;
  refuses("x:", cuda::launch_bitplane_linear(launcher, args));
  args.layer.x = args.layer.y = planes;
  refuses("weight_sum:", cuda::launch_bitplane_linear(launcher, args));
  args.layer.input_quant_max = 0;
  refuses("input_quant_max:", cuda::launch_bitplane_linear(launcher, args));
  args.layer.input_quant_max = 3;
  args.layer.input_scale = 0.0F;
  refuses("input_scale:", cuda::launch_bitplane_linear(launcher, args));
}

void test_products(const Setting& setting) {
  for (PlaneForm a_form : kForms) {
    for (PlaneForm b_form : kForms) {
      test_matmul({5, 9, 130}, 2, a_form, 1, b_form, setting);
      test_matmul({3, 4, 65}, 3, a_form, 2, b_form, setting);
    }
  }
  // Several tiles; rows of 16, 8 and 4-byte pieces; several steps of a pass; nothing.
  for (const Size& s : {Size{130, 140, 64}, Size{20, 130, 1000}, Size{1, 1, 1}, Size{9, 5, 2048}, Size{3, 2, 0},
                        Size{0, 3, 5}, Size{3, 0, 5}}) {
    test_matmul(s, 2, PlaneForm::kUnsigned, 2, PlaneForm::kSigned, setting);
  }
  test_matmul({2, 3, 700}, 8, PlaneForm::kSigned, 8, PlaneForm::kUnsigned, setting);
  for (bool on_device : {false, true}) {
    test_linear<float>({5, 9, 100}, 1, PlaneForm::kOdd, 3, on_device, setting);
    test_linear<float>({18, 9, 1100}, 2, PlaneForm::kSigned, 7, on_device, setting);
    test_linear<BFloat16>({5, 130, 64}, 1, PlaneForm::kOdd, 15, on_device, setting);
    test_linear<Float16>({3, 7, 1}, 2, PlaneForm::kOdd, 2, on_device, setting);
  }
}

void run_all() {
  test_refusals();
  for (const Setting& setting : kSettings) {
    for (int64_t k : {1, 63, 64, 65, 200}) {
      for (PlaneForm form : kForms) {
        for (int bits : {1, 2, 3, 7}) test_packing(k, bits, form, setting);
      }
    }
    test_products(setting);
  }
}

}  // namespace
}  // namespace kdq::test

int main() { return kdq::test::run_tests(kdq::test::run_all); }
