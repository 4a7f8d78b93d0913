// The codebook family for GPUs against the reference.
#include "cuda/codebook.h"
#include "support.h"

namespace kdq::test {
namespace {

std::string name(int64_t m, int64_t n, int64_t k, int bits) {
  return std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k) + ", " + std::to_string(bits) +
         " bits";
}

std::vector<uint8_t> random_indices(int64_t n, int64_t k, int bits) {
  std::vector<uint8_t> indices(static_cast<size_t>(n * k));
  for (uint8_t& index : indices) index = static_cast<uint8_t>(generator()() % (1U << bits));
  return indices;
}

std::vector<uint32_t> packed(const std::vector<uint8_t>& indices, int64_t n, int64_t k, int bits) {
  std::vector<uint32_t> words(static_cast<size_t>(codebook_panels(n) * codebook_words(k, bits) * kCodebookLanes));
  require(pack_indices(indices.data(), n, k, bits, words.data(), serial_executor()));
  return words;
}

void test_packing(int64_t n, int64_t k, int bits, const Setting& setting) {
  const std::vector<uint8_t> indices = random_indices(n, k, bits);
  const std::vector<uint32_t> expected = packed(indices, n, k, bits);
  const Launcher launcher(setting.descending);
  Buffer<uint8_t> in(indices, setting.place);
  Buffer<uint32_t> words(expected.size(), setting.place);
  run_watched(words, [&] { return cuda::launch_pack_indices(launcher, in.data(), n, k, bits, words.data()); });
  CHECK(words.values() == expected, "%s", name(0, n, k, bits).c_str());
  Buffer<uint8_t> out(indices.size(), setting.place);
  run_watched(out, [&] { return cuda::launch_unpack_indices(launcher, words.data(), n, k, bits, out.data()); });
  CHECK_SAME(out.values(), indices, name(0, n, k, bits));
}

template <class T>
void test_linear(int64_t m, int64_t n, int64_t k, int bits, Activation activation, bool has_bias,
                 const Setting& setting) {
  const std::vector<T> x = narrowed<T>(normals(static_cast<size_t>(m * k)));
  const std::vector<uint32_t> words = packed(random_indices(n, k, bits), n, k, bits);
  const std::vector<float> codebook = normals(size_t{1} << bits);
  const std::vector<float> bias = normals(static_cast<size_t>(n));
  std::vector<T> expected(static_cast<size_t>(m * n));
  CodebookLinear args;
  args.dtype = dtype_of<T>();
  args.x = x.data();
  args.y = expected.data();
  args.m = m;
  args.n = n;
  args.k = k;
  args.packed = words.data();
  args.bits = bits;
  args.codebook = codebook.data();
  args.bias = has_bias ? bias.data() : nullptr;
  args.activation = activation;
  require(codebook_linear(args, serial_executor()));

  Buffer<T> in(x, setting.place);
  Buffer<uint32_t> of_words(words, setting.place);
  Buffer<float> of_codebook(codebook, setting.place);
  Buffer<float> of_bias(bias, setting.place);
  Buffer<T> out(expected.size(), setting.place);
  args.x = in.data();
  args.y = out.data();
  args.packed = of_words.data();
  args.codebook = of_codebook.data();
  args.bias = has_bias ? of_bias.data() : nullptr;
  run_watched(out, [&] { return cuda::launch_codebook_linear(Launcher(setting.descending), args); });
  const std::vector<T> got = out.values();
  const double step = step_of<T>(0.0);
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = static_cast<double>(reference::load(&got[i]));
    const double b = static_cast<double>(reference::load(&expected[i]));
    const double of_sum = 1e-6 * static_cast<double>(k + 1);
    CHECK(std::fabs(a - b) <= of_sum + step * std::fabs(b), "%s at %zu: %g, expected %g", name(m, n, k, bits).c_str(),
          i, a, b);
  }
}

void test_refusals() {
  const Launcher launcher(false);
  uint8_t indices[4] = {};
  uint32_t words[16] = {};
  refuses("bits", cuda::launch_pack_indices(launcher, indices, 1, 4, 6, words));
  refuses("indices", cuda::launch_pack_indices(launcher, nullptr, 1, 4, 2, words));
  refuses("packed", cuda::launch_unpack_indices(launcher, nullptr, 1, 4, 2, indices));
  CodebookLinear args;
  args.m = args.n = args.k = args.bits = 1;
  args.x = words;
  args.packed = words;
  refuses("codebook", cuda::launch_codebook_linear(launcher, args));
}

void run_all() {
  test_refusals();
  for (const Setting& setting : kSettings) {
    for (int bits = 1; bits <= kCodebookMaxBits; ++bits) {
      test_packing(1, 1, bits, setting);
      test_packing(37, 71, bits, setting);
      test_linear<float>(3, 19, 70, bits, Activation::kNone, true, setting);
      test_linear<BFloat16>(18, 70, 37, bits, Activation::kRelu, false, setting);
      test_linear<Float16>(21, 30, 80, bits, Activation::kGelu, true, setting);
    }
    test_packing(3, 0, 2, setting);
    test_linear<Float16>(5, 9, 600, 4, Activation::kSilu, true, setting);
    test_linear<float>(70, 66, 100, 5, Activation::kNone, false, setting);
    test_linear<float>(20, 3, 0, 3, Activation::kNone, true, setting);
  }
}

}  // namespace
}  // namespace kdq::test

int main() { return kdq::test::run_tests(kdq::test::run_all); }
