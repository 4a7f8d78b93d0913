// Signs, binary products and int8 products for GPUs against the reference.
#include "products.h"
#include "cuda/binary_gemm.h"
#include "cuda/int8_gemm.h"

namespace kdq::test {
namespace {

template <class T>
void test_signs(int64_t k, const Setting& setting) {
  constexpr int64_t kRows = 5;
  const std::vector<T> x = narrowed<T>(awkward(static_cast<size_t>(kRows * k)));
  const std::vector<uint64_t> expected = packed(x, kRows, k);
  const Launcher launcher(setting.descending);
  Buffer<T> in(x, setting.place);
  Buffer<uint64_t> bits(expected.size(), setting.place);
  run_watched(bits, [&] { return cuda::launch_pack_signs(launcher, dtype_of<T>(), in.data(), kRows, k, bits.data()); });
  CHECK_SAME(bits.values(), expected, "k = " + std::to_string(k));
  std::vector<float> signs(x.size());
  require(unpack_signs(expected.data(), kRows, k, signs.data(), serial_executor()));
  Buffer<float> out(x.size(), setting.place);
  run_watched(out, [&] { return cuda::launch_unpack_signs(launcher, bits.data(), kRows, k, out.data()); });
  CHECK_SAME(out.values(), signs, "k = " + std::to_string(k));
}

void test_binary(const Size& s, const Setting& setting) {
  const std::vector<uint64_t> a = packed(normals(static_cast<size_t>(s.m * s.k)), s.m, s.k);
  const std::vector<uint64_t> b = packed(normals(static_cast<size_t>(s.n * s.k)), s.n, s.k);
  std::vector<int32_t> expected(static_cast<size_t>(s.m * s.n));
  require(binary_matmul(a.data(), b.data(), s.m, s.n, s.k, expected.data(), serial_executor()));
  Buffer<uint64_t> of_a(a, setting.place);
  Buffer<uint64_t> of_b(b, setting.place);
  Buffer<int32_t> out(expected.size(), setting.place);
  run_watched(out, [&] {
    return cuda::launch_binary_matmul(Launcher(setting.descending), of_a.data(), of_b.data(), s.m, s.n, s.k,
                                      out.data());
  });
  CHECK_SAME(out.values(), expected, name(s));
}

// The two layers on values (bits = false) or on their signs.
template <class T>
void test_binary_layers(const Size& s, bool bits, const Setting& setting) {
  const std::vector<T> x = narrowed<T>(normals(static_cast<size_t>(s.m * s.k)));
  const std::vector<uint64_t> x_bits = packed(x, s.m, s.k);
  const std::vector<uint64_t> w = packed(normals(static_cast<size_t>(s.n * s.k)), s.n, s.k);
  const std::vector<float> scale = normals(static_cast<size_t>(s.n));
  const std::vector<float> bias = normals(static_cast<size_t>(s.n));
  std::vector<int32_t> threshold(static_cast<size_t>(s.n));
  for (size_t i = 0; i < threshold.size(); ++i) threshold[i] = static_cast<int32_t>(i % 17) - 8;
  std::vector<T> y(static_cast<size_t>(s.m * s.n));
  std::vector<uint64_t> y_bits(words(s.m, s.n));
  BinaryLinear linear;
  BinaryThreshold hidden;
  linear.dtype = hidden.dtype = dtype_of<T>();
  linear.m = hidden.m = s.m;
  linear.n = hidden.n = s.n;
  linear.k = hidden.k = s.k;
  const auto point_to = [&](const void* values, const uint64_t* signs, const uint64_t* weight, const float* of_scale,
                            const float* of_bias, const int32_t* of_threshold) {
    linear.x = hidden.x = bits ? nullptr : values;
    linear.x_bits = hidden.x_bits = bits ? signs : nullptr;
    linear.weight_bits = hidden.weight_bits = weight;
    linear.weight_scale = of_scale;
    linear.bias = bits ? nullptr : of_bias;
    hidden.threshold = of_threshold;
  };
  point_to(x.data(), x_bits.data(), w.data(), scale.data(), bias.data(), threshold.data());
  linear.y = y.data();
  hidden.y_bits = y_bits.data();
  require(binary_linear(linear, serial_executor()));
  require(binary_threshold(hidden, serial_executor()));

  Buffer<T> in(x, setting.place);
  Buffer<uint64_t> in_bits(x_bits, setting.place);
  Buffer<uint64_t> weight(w, setting.place);
  Buffer<float> of_scale(scale, setting.place);
  Buffer<float> of_bias(bias, setting.place);
  Buffer<int32_t> of_threshold(threshold, setting.place);
  Buffer<T> out(y.size(), setting.place);
  Buffer<uint64_t> out_bits(y_bits.size(), setting.place);
  Buffer<uint64_t> workspace(x_bits.size(), Place::kStart);
  point_to(in.data(), in_bits.data(), weight.data(), of_scale.data(), of_bias.data(), of_threshold.data());
  linear.y = out.data();
  hidden.y_bits = out_bits.data();
  void* scratch = bits ? nullptr : workspace.data();
  const Launcher launcher(setting.descending);
  run_watched(out, [&] { return cuda::launch_binary_linear(launcher, linear, scratch); });
  run_watched(out_bits, [&] { return cuda::launch_binary_threshold(launcher, hidden, scratch); });
  CHECK_SAME(out.values(), y, name(s));
  CHECK_SAME(out_bits.values(), y_bits, name(s));
}

void test_int8(const Size& s, const Setting& setting) {
  const std::vector<int8_t> a = integers(s.m * s.k);
  const std::vector<int8_t> b = integers(s.n * s.k);
  const std::vector<char> weight = packed_weight(b, s.n, s.k);
  std::vector<int32_t> expected(static_cast<size_t>(s.m * s.n));
  require(int8_matmul(a.data(), s.m, s.k, weight.data(), weight.size(), expected.data(), serial_executor()));
  Buffer<int8_t> of_a(a, setting.place);
  Buffer<int8_t> of_b(b, setting.place);
  Buffer<int32_t> out(expected.size(), setting.place);
  Buffer<char> workspace(cuda::partial_bytes(s.m, s.n, s.k), Place::kStart);
  void* partial = workspace.bytes() == 0 ? nullptr : workspace.data();
  run_watched(out, [&] {
    return cuda::launch_int8_matmul(Launcher(setting.descending), of_a.data(), of_b.data(), s.m, s.n, s.k, out.data(),
                                    partial);
  });
  CHECK_SAME(out.values(), expected, name(s));
}

// Rounding of the activation's functions, and one step of the type.
template <class T>
bool close(const T& got, const T& expected) {
  const double a = reference::load(&got);
  const double b = reference::load(&expected);
  const double step = step_of<T>(1e-6);
  return same(got, expected) || std::fabs(a - b) <= step * std::fabs(b) + 1e-6;
}

// Dynamic activations, static ones by numbers, or by numbers in device memory.
enum class Input { kDynamic, kStatic, kStaticAt };

template <class T>
void test_linear(const Size& s, Activation activation, bool has_bias, Input input, const Setting& setting) {
  constexpr float kInputScale = 0.02F;
  constexpr int32_t kZeroPoint = 101;
  std::vector<float> values = normals(static_cast<size_t>(s.m * s.k));
  values[0] = NAN;                                           // row 0
  if (s.m > 1) values[static_cast<size_t>(s.k)] = INFINITY;  // row 1
  const std::vector<T> x = narrowed<T>(values);
  const std::vector<int8_t> w = integers(s.n * s.k);
  const std::vector<char> weight = packed_weight(w, s.n, s.k);
  std::vector<float> scale(static_cast<size_t>(s.n));
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = 0.001F + 1e-5F * static_cast<float>(i);
  const std::vector<float> bias = normals(static_cast<size_t>(s.n));
  std::vector<T> expected(static_cast<size_t>(s.m * s.n));
  Int8Linear on_cpu = linear_on_cpu(s, x, weight, scale, &expected);
  on_cpu.bias = has_bias ? bias.data() : nullptr;
  on_cpu.activation = activation;
  on_cpu.is_static = input != Input::kDynamic;
  on_cpu.input_scale = kInputScale;
  on_cpu.input_zero_point = kZeroPoint;
  on_cpu.input_quant_max = 200;
  require(int8_linear(on_cpu, serial_executor()));

  Buffer<T> in(x, setting.place);
  Buffer<float> of_scale(scale, setting.place);
  Buffer<float> of_bias(bias, setting.place);
  Buffer<int8_t> of_w(w, setting.place);
  Buffer<T> out(expected.size(), setting.place);
  Buffer<char> workspace(cuda::linear_workspace_bytes(s.m, s.n, s.k), Place::kStart);
  Buffer<float> input_scale(std::vector<float>{kInputScale}, setting.place);
  Buffer<int32_t> zero_point(std::vector<int32_t>{kZeroPoint}, setting.place);
  cuda::Int8Linear args;
  args.dtype = dtype_of<T>();
  args.x = in.data();
  args.y = out.data();
  args.m = s.m;
  args.n = s.n;
  args.k = s.k;
  args.weight = of_w.data();
  args.weight_scale = of_scale.data();
  args.bias = has_bias ? of_bias.data() : nullptr;
  args.activation = activation;
  args.workspace = workspace.data();
  args.is_static = input != Input::kDynamic;
  args.input_quant_max = 200;
  if (input == Input::kStatic) args.input_scale = kInputScale;
  if (input == Input::kStatic) args.input_zero_point = kZeroPoint;
  if (input == Input::kStaticAt) args.input_scale_at = input_scale.data();
  if (input == Input::kStaticAt) args.input_zero_point_at = zero_point.data();
  run_watched(out, [&] { return cuda::launch_int8_linear(Launcher(setting.descending), args); });
  const std::vector<T> got = out.values();
  for (size_t i = 0; i < got.size(); ++i) {
    CHECK(close(got[i], expected[i]), "%s at %zu: %g, expected %g", name(s).c_str(), i,
          static_cast<double>(reference::load(&got[i])), static_cast<double>(reference::load(&expected[i])));
  }
}

// Numbers given are checked, those in device memory are not: then the next fault is what the error names.
void test_static_grid_refusals(cuda::Int8Linear linear) {
  const Launcher launcher(false);
  const float scale = 1.0F;
  const int32_t zero_point = 0;
  linear.is_static = true;
  for (float bad : {0.0F, -1.0F, NAN, INFINITY, 1e-41F}) {
    linear.input_scale = bad;
    linear.input_scale_at = nullptr;
    refuses("input_scale:", cuda::launch_int8_linear(launcher, linear));
    linear.input_scale_at = &scale;
    refuses("weight:", cuda::launch_int8_linear(launcher, linear));
  }
  linear.input_quant_max = 15;
  for (int32_t bad : {-1, 16}) {
    linear.input_zero_point = bad;
    linear.input_zero_point_at = nullptr;
    refuses("input_zero_point:", cuda::launch_int8_linear(launcher, linear));
    linear.input_zero_point_at = &zero_point;
    refuses("weight:", cuda::launch_int8_linear(launcher, linear));
  }
  for (int32_t bad : {0, 256}) {
    linear.input_quant_max = bad;
    refuses("input_quant_max:", cuda::launch_int8_linear(launcher, linear));
  }
}

void test_refusals() {
  const Launcher launcher(false);
  int32_t out = 0;
  const int8_t a[2] = {};
  refuses("k:", cuda::launch_int8_matmul(launcher, a, a, 1, 1, kInt8MaxK + 1, &out, nullptr));
  refuses("a:", cuda::launch_int8_matmul(launcher, nullptr, a, 1, 1, 2, &out, nullptr));
  refuses("k:", cuda::launch_binary_matmul(launcher, nullptr, nullptr, 1, 1, -1, &out));
  cuda::Int8Linear linear{DType::kFloat32, a, &out, 1, 1, 1};
  refuses("weight:", cuda::launch_int8_linear(launcher, linear));
  test_static_grid_refusals(linear);
  linear.is_static = true;
  linear.k = kInt8StaticMaxK + 1;
  refuses("k:", cuda::launch_int8_linear(launcher, linear));
  BinaryLinear binary;
  binary.m = binary.n = binary.k = 1;
  binary.y = &out;
  refuses("weight_scale", cuda::launch_binary_linear(launcher, binary, nullptr));
  BinaryThreshold threshold;
  threshold.m = threshold.n = threshold.k = 1;
  uint64_t bits = 0;
  threshold.y_bits = &bits;
  threshold.threshold = &out;
  threshold.weight_bits = &bits;
  refuses("x:", cuda::launch_binary_threshold(launcher, threshold, nullptr));
  threshold.x = &out;
  refuses("workspace", cuda::launch_binary_threshold(launcher, threshold, nullptr));
}

// How many pieces of k, and that they cover it.
void test_splits() {
  CHECK(cuda::splits_of(4096, 4096, 4096) == 1, "enough tiles");
  CHECK(cuda::splits_of(128, 4096, 4096) == 4, "32 tiles");
  CHECK(cuda::splits_of(128, 128, 4096) == 4, "pieces of 1 KiB");
  CHECK(cuda::splits_of(16, 4096, 4096) == 1, "small_product.h does it");
  CHECK(cuda::partial_bytes(128, 128, 4096) == 4 * 128 * 128 * 4, "an int32 a result and piece");
}

void test_products(const Setting& setting) {
  // Few rows; less than a tile, several tiles, bytes in 16s, 4s and ones, several steps.
  for (const Size& size : {Size{1, 1, 1}, Size{130, 140, 64}, Size{9, 30, 1000}, Size{20, 5, 512}, Size{16, 9, 4500},
                           Size{17, 20, 130}, Size{3, 2, 0}, Size{18, 2, 0}, Size{0, 3, 5}, Size{3, 0, 5}}) {
    test_binary(size, setting);
    test_binary_layers<float>(size, false, setting);
  }
  test_binary_layers<BFloat16>({7, 66, 100}, false, setting);
  test_binary_layers<Float16>({19, 150, 70}, false, setting);
  test_binary_layers<float>({5, 129, 70}, true, setting);
  test_binary_layers<float>({40, 65, 70}, true, setting);
  for (const Size& size : {Size{1, 1, 1}, Size{130, 133, 37}, Size{20, 9, 160}, Size{65, 70, 44}, Size{3, 2, 0},
                           Size{1, 40, 1000}, Size{8, 9, 2048}, Size{9, 17, 63}, Size{16, 8, 516}, Size{20, 2, 0}}) {
    test_int8(size, setting);
  }
  // Pieces of k: the last one shorter, rows that end within a piece's last step, and a last piece of nothing.
  for (const Size& size : {Size{20, 9, 2048}, Size{17, 130, 3101}, Size{17, 3, 18450}}) test_int8(size, setting);
}

void test_linears(const Setting& setting) {
  for (Input input : {Input::kDynamic, Input::kStatic, Input::kStaticAt}) {
    test_linear<float>({5, 9, 100}, Activation::kNone, true, input, setting);
    test_linear<float>({18, 9, 100}, Activation::kNone, true, input, setting);
    test_linear<float>({4, 8, 64}, Activation::kGelu, false, input, setting);
    test_linear<BFloat16>({5, 9, 33}, Activation::kSilu, true, input, setting);
    test_linear<Float16>({3, 130, 48}, Activation::kRelu, true, input, setting);
    test_linear<BFloat16>({21, 9, 2110}, Activation::kRelu, true, input, setting);
  }
}

void run_all() {
  test_refusals();
  test_splits();
  for (const Setting& setting : kSettings) {
    for (int64_t k : {1, 63, 64, 65, 200, 1000}) {
      for_each_dtype([&](auto element) { test_signs<decltype(element)>(k, setting); });
    }
    test_products(setting);
    test_linears(setting);
  }
}

}  // namespace
}  // namespace kdq::test

int main() { return kdq::test::run_tests(kdq::test::run_all); }
