// Signs, binary products and int8 products for GPUs against the reference.
#include "cuda/binary_gemm.h"
#include "cuda/int8_gemm.h"
#include "cuda/signs.h"
#include "support.h"

namespace kdq::test {
namespace {

struct Size {
  int64_t m;
  int64_t n;
  int64_t k;
};

std::string name(const Size& s) {
  return std::to_string(s.m) + " x " + std::to_string(s.n) + " x " + std::to_string(s.k);
}

size_t words(int64_t rows, int64_t k) { return static_cast<size_t>(rows * binary_words(k)); }

template <class T>
std::vector<uint64_t> packed(const std::vector<T>& x, int64_t rows, int64_t k) {
  std::vector<uint64_t> bits(words(rows, k));
  require(pack_signs(dtype_of<T>(), x.data(), rows, k, bits.data(), serial_executor()));
  return bits;
}

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

std::vector<int8_t> integers(int64_t n) {
  std::vector<int8_t> values(static_cast<size_t>(n));
  for (int8_t& value : values) value = static_cast<int8_t>(generator()());
  for (size_t i = 0; i < values.size(); i += 5) values[i] = -128;
  return values;
}

std::vector<char> packed_weight(const std::vector<int8_t>& w, int64_t n, int64_t k) {
  size_t bytes = 0;
  require(int8_packed_bytes(n, k, &bytes));
  std::vector<char> result(bytes);
  require(pack_int8_weight(w.data(), n, k, result.data(), bytes, serial_executor()));
  return result;
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
  run_watched(out, [&] {
    return cuda::launch_int8_matmul(Launcher(setting.descending), of_a.data(), of_b.data(), s.m, s.n, s.k, out.data());
  });
  CHECK_SAME(out.values(), expected, name(s));
}

// Rounding of the activation's functions, and one step of the type.
template <class T>
bool close(const T& got, const T& expected) {
  const double a = reference::load(&got);
  const double b = reference::load(&expected);
  const double step = dtype_of<T>() == DType::kFloat32 ? 1e-6 : dtype_of<T>() == DType::kBFloat16 ? 8e-3 : 1e-3;
  return same(got, expected) || std::fabs(a - b) <= step * std::fabs(b) + 1e-6;
}

template <class T>
void test_linear(const Size& s, Activation activation, bool has_bias, const Setting& setting) {
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
  Int8Linear on_cpu;
  on_cpu.dtype = dtype_of<T>();
  on_cpu.x = x.data();
  on_cpu.y = expected.data();
  on_cpu.m = s.m;
  on_cpu.k = s.k;
  on_cpu.packed = weight.data();
  on_cpu.packed_bytes = weight.size();
  on_cpu.weight_scale = scale.data();
  on_cpu.bias = has_bias ? bias.data() : nullptr;
  on_cpu.activation = activation;
  require(int8_linear(on_cpu, serial_executor()));

  Buffer<T> in(x, setting.place);
  Buffer<float> of_scale(scale, setting.place);
  Buffer<float> of_bias(bias, setting.place);
  Buffer<int8_t> of_w(w, setting.place);
  Buffer<T> out(expected.size(), setting.place);
  Buffer<char> workspace(cuda::linear_workspace_bytes(s.m, s.k), Place::kStart);
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
  run_watched(out, [&] { return cuda::launch_int8_linear(Launcher(setting.descending), args); });
  const std::vector<T> got = out.values();
  for (size_t i = 0; i < got.size(); ++i) {
    CHECK(close(got[i], expected[i]), "%s at %zu: %g, expected %g", name(s).c_str(), i,
          static_cast<double>(reference::load(&got[i])), static_cast<double>(reference::load(&expected[i])));
  }
}

void test_refusals() {
  const Launcher launcher(false);
  int32_t out = 0;
  const int8_t a[2] = {};
  CHECK(!cuda::launch_int8_matmul(launcher, a, a, 1, 1, kInt8MaxK + 1, &out).ok(), "k is too large");
  CHECK(!cuda::launch_int8_matmul(launcher, nullptr, a, 1, 1, 2, &out).ok(), "a is null");
  CHECK(!cuda::launch_binary_matmul(launcher, nullptr, nullptr, 1, 1, -1, &out).ok(), "k is negative");
  CHECK(!cuda::launch_int8_linear(launcher, cuda::Int8Linear{DType::kFloat32, a, &out, 1, 1, 1}).ok(), "no weight");
}

void run_all() {
  test_refusals();
  for (const Setting& setting : kSettings) {
    for (int64_t k : {1, 63, 64, 65, 200, 1000}) {
      for_each_dtype([&](auto element) { test_signs<decltype(element)>(k, setting); });
    }
    // Less than a tile, several tiles, bytes in 16s, 4s and ones, several steps.
    for (const Size& size : {Size{1, 1, 1}, Size{130, 140, 64}, Size{9, 30, 1000}, Size{20, 5, 512}, Size{3, 2, 0}}) {
      test_binary(size, setting);
    }
    for (const Size& size : {Size{1, 1, 1}, Size{130, 133, 37}, Size{20, 9, 160}, Size{65, 70, 44}, Size{3, 2, 0}}) {
      test_int8(size, setting);
    }
    test_linear<float>({5, 9, 100}, Activation::kNone, true, setting);
    test_linear<float>({4, 8, 64}, Activation::kGelu, false, setting);
    test_linear<BFloat16>({5, 9, 33}, Activation::kSilu, true, setting);
    test_linear<Float16>({3, 130, 48}, Activation::kRelu, true, setting);
  }
}

}  // namespace
}  // namespace kdq::test

int main() { return kdq::test::run_tests(kdq::test::run_all); }
