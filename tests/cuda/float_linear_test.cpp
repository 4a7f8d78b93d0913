// Linear layers with x in floating point, for GPUs: against the reference, and their sums on tensor cores against
// float64, with bounds that a lost term or a sum that is cut too often passes.
#include "cuda/float_linear.h"
#include "cuda/codebook.h"
#include "products.h"

namespace kdq::test {
namespace {

// ---- int8 as pairs -------------------------------------------------------------------------------------------------

// Thread t of 256 makes pairs of the bytes t, t + 1, 255 - t and 0.
template <class Half>
struct ConvertBytes {
  static constexpr int kThreads = 256;
  struct Shared {};

  uint32_t* pairs;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const auto own = static_cast<uint32_t>(thread.index());
    uint32_t result[2];
    cuda::Pairs<Half>::from_int8(own | (own + 1) % 256 << 8 | (255 - own) << 16, result);
    for (int i = 0; i < 2; ++i) thread.store(pairs + 2 * own + i, result[i]);
  }
};

template <class Half>
void test_every_int8() {
  Buffer<uint32_t> pairs(512, Place::kStart);
  run_watched(pairs, [&] { return Launcher(false).run(ConvertBytes<Half>{pairs.data()}, 1); });
  for (uint32_t t = 0; t < 256; ++t) {
    const uint32_t bytes[4] = {t, (t + 1) % 256, 255 - t, 0};
    for (uint32_t i = 0; i < 4; ++i) {
      const Half half = {static_cast<uint16_t>(pairs.data()[2 * t + i / 2] >> 16 * (i % 2))};
      const float got = reference::load(&half);
      const auto expected = static_cast<float>(static_cast<int8_t>(bytes[i]));
      CHECK(same(got, expected), "byte %u at %u: %g", bytes[i], i, static_cast<double>(got));
    }
  }
}

// ---- sums against float64 ------------------------------------------------------------------------------------------

// x @ w.T in float32, whatever x is, by the kernel with tiles of kSide, all of whose sums must be within
// bound * sum of |x w| + least of the sum in float64.
template <int kSide, class T, class Weights>
void check_sums(const Size& s, const std::vector<T>& x, const std::vector<float>& w, const Weights& weights,
                double bound, double least, const Setting& setting) {
  Buffer<T> in(x, setting.place);
  Buffer<float> out(static_cast<size_t>(s.m * s.n), setting.place);
  const cuda::LinearOutput to = {out.data(), DType::kFloat32, s.n, nullptr, nullptr, Activation::kNone};
  run_watched(out, [&] {
    return cuda::launch_float_product<kSide, float>(Launcher(setting.descending), in.data(), s.m, weights, to);
  });
  for (int64_t r = 0; r < s.m; ++r) {
    for (int64_t c = 0; c < s.n; ++c) {
      double sum = 0.0;
      double magnitude = 0.0;
      for (int64_t i = 0; i < s.k; ++i) {
        const double product =
            double{reference::load(&x[static_cast<size_t>(r * s.k + i)])} * double{w[static_cast<size_t>(c * s.k + i)]};
        sum += product;
        magnitude += std::fabs(product);
      }
      const double got = out.data()[r * s.n + c];
      CHECK(std::fabs(got - sum) <= bound * magnitude + least, "%s, %lld bytes of x, at %lld %lld: %.9g, not %.9g",
            name(s).c_str(), static_cast<long long>(sizeof(T)), static_cast<long long>(r), static_cast<long long>(c),
            got, sum);
    }
  }
}

// Values of one sign are the harder ones: whatever the sums lose then adds up.
template <class T>
std::vector<T> inputs(const Size& s, bool positive, float deviation = 1.0F) {
  std::vector<float> values = normals(static_cast<size_t>(s.m * s.k), deviation);
  for (float& value : values) value = positive ? std::fabs(value) : value;
  return narrowed<T>(values);
}

template <int kSide, class T>
void test_int8_sums(const Size& s, bool positive, const Setting& setting) {
  std::vector<int8_t> w = integers(s.n * s.k);
  for (int8_t& value : w) value = positive ? static_cast<int8_t>(value & 127) : value;
  Buffer<int8_t> of_w(w, setting.place);
  const cuda::Int8Weights weights = {s.n, s.k, cuda::operand_of(of_w.data(), s.n, s.k)};
  // 16-bit x: 64 sums of 16 products, one after the other, each cut by 2^-23 at most.
  const double bound = dtype_of<T>() == DType::kFloat32 ? 0x1p-20 : 0x1p-18;
  check_sums<kSide>(s, inputs<T>(s, positive), std::vector<float>(w.begin(), w.end()), weights, bound, 0.0, setting);
}

// Terms of float32 x that lie below what bfloat16 has.
void test_tiny_x(const Setting& setting) {
  const Size s = {17, 9, 50};
  const std::vector<int8_t> w = integers(s.n * s.k);
  Buffer<int8_t> of_w(w, setting.place);
  const cuda::Int8Weights weights = {s.n, s.k, cuda::operand_of(of_w.data(), s.n, s.k)};
  for (float deviation : {0x1p-108F, 0x1p-118F, 0x1p-130F}) {
    check_sums<64>(s, inputs<float>(s, false, deviation), std::vector<float>(w.begin(), w.end()), weights, 0x1p-20,
                   128.0 * 50 * 0x1p-133, setting);
  }
}

// largest: about what the largest entry is.
template <int kSide, class T>
void test_codebook_sums(const Size& s, int bits, float largest, bool positive, const Setting& setting) {
  std::vector<float> codebook = normals(size_t{1} << bits, largest);
  for (float& entry : codebook) entry = positive ? std::fabs(entry) : entry;
  std::vector<uint8_t> indices(static_cast<size_t>(s.n * s.k));
  for (uint8_t& index : indices) index = static_cast<uint8_t>(generator()() % codebook.size());
  std::vector<float> w(indices.size());
  for (size_t i = 0; i < w.size(); ++i) w[i] = codebook[indices[i]];
  std::vector<uint32_t> packed(static_cast<size_t>(codebook_panels(s.n) * codebook_words(s.k, bits) * kCodebookLanes));
  require(pack_indices(indices.data(), s.n, s.k, bits, packed.data(), serial_executor()));
  Buffer<uint32_t> of_packed(packed, setting.place);
  Buffer<float> of_codebook(codebook, setting.place);
  const cuda::CodebookWeights weights = {s.n, s.k, of_packed.data(), of_codebook.data(), {s.n, s.k, bits}};
  const double bound = dtype_of<T>() == DType::kBFloat16 ? 0x1p-16 + 0x1p-20 : 0x1p-20;
  check_sums<kSide>(s, inputs<T>(s, positive), w, weights, bound, 0.0, setting);
}

// An infinity times a second term of 0, or of the other sign, is NaN. It must stay in its row.
template <class T>
void test_infinity_and_codebook(const Setting& setting) {
  const Size s = {18, 20, 40};
  std::vector<uint32_t> packed(static_cast<size_t>(codebook_panels(s.n) * codebook_words(s.k, 2) * kCodebookLanes));
  for (uint32_t& word : packed) word = static_cast<uint32_t>(generator()());
  Buffer<uint32_t> of_packed(packed, setting.place);
  Buffer<float> codebook(std::vector<float>{-1.0F, -0.3F, 0.3F, 1.0F}, setting.place);
  const cuda::CodebookWeights weights = {s.n, s.k, of_packed.data(), codebook.data(), {s.n, s.k, 2}};
  std::vector<T> x = inputs<T>(s, false);
  std::vector<float> results[2];
  for (std::vector<float>& result : results) {
    Buffer<T> in(x, setting.place);
    Buffer<float> out(static_cast<size_t>(s.m * s.n), setting.place);
    const cuda::LinearOutput to = {out.data(), DType::kFloat32, s.n, nullptr, nullptr, Activation::kNone};
    require(cuda::launch_float_product<64, float>(Launcher(setting.descending), in.data(), s.m, weights, to));
    result = out.values();
    reference::store(&x[3], INFINITY);
  }
  for (size_t i = 0; i < results[0].size(); ++i) {
    const bool of_first_row = i < static_cast<size_t>(s.n);
    CHECK(of_first_row ? !std::isfinite(results[1][i]) : same(results[0][i], results[1][i]), "at %zu", i);
  }
}

void test_sums(const Setting& setting) {
  for (const Size& size : {Size{17, 9, 1000}, Size{67, 130, 50}, Size{1, 1, 3}, Size{64, 64, 64}}) {
    for (bool positive : {false, true}) {
      for_each_dtype([&](auto element) {
        test_int8_sums<64, decltype(element)>(size, positive, setting);
        test_int8_sums<128, decltype(element)>(size, positive, setting);
      });
    }
  }
  test_tiny_x(setting);
  test_infinity_and_codebook<BFloat16>(setting);
  test_infinity_and_codebook<Float16>(setting);
  for (bool positive : {false, true}) {
    for (int bits = 1; bits <= kCodebookMaxBits; ++bits) {
      test_codebook_sums<64, BFloat16>({5, 70, 100}, bits, 1.0F, positive, setting);
      test_codebook_sums<64, Float16>({5, 70, 100}, bits, 1.0F, positive, setting);
    }
    test_codebook_sums<128, BFloat16>({131, 133, 79}, 3, 1.0F, positive, setting);
    test_codebook_sums<128, Float16>({131, 133, 79}, 5, 1.0F, positive, setting);
    test_codebook_sums<64, Float16>({17, 9, 1000}, 4, 1.0F, positive, setting);
  }
  for (float largest : {0.0F, 1e-38F, 1e-30F, 1e-6F, 1e6F, 1e30F}) {
    test_codebook_sums<64, Float16>({3, 5, 40}, 4, largest, false, setting);
    if (largest < 1e-37F) continue;  // second terms that bfloat16 does not have
    test_codebook_sums<64, BFloat16>({3, 5, 40}, 4, largest, false, setting);
  }
}

// ---- int8_weight_only_linear against the reference -----------------------------------------------------------------

// Every weight has the scale 0.01.
template <class T>
void check_weight_only(const Size& s, const std::vector<T>& x, const std::vector<int8_t>& w, Activation activation,
                       bool has_bias, const Setting& setting) {
  const std::vector<char> weight = packed_weight(w, s.n, s.k);
  const std::vector<float> scale(static_cast<size_t>(s.n), 0.01F);
  const std::vector<float> bias = normals(static_cast<size_t>(s.n));
  std::vector<T> expected(static_cast<size_t>(s.m * s.n));
  Int8Linear on_cpu = linear_on_cpu(s, x, weight, scale, &expected);
  on_cpu.bias = has_bias ? bias.data() : nullptr;
  on_cpu.activation = activation;
  require(int8_weight_only_linear(on_cpu, serial_executor()));

  Buffer<T> in(x, setting.place);
  Buffer<float> of_scale(scale, setting.place);
  Buffer<float> of_bias(bias, setting.place);
  Buffer<int8_t> of_w(w, setting.place);
  Buffer<T> out(expected.size(), setting.place);
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
  run_watched(out, [&] { return cuda::launch_weight_only_linear(Launcher(setting.descending), args); });
  const std::vector<T> got = out.values();
  const double step = step_of<T>(1e-6);
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = static_cast<double>(reference::load(&got[i]));
    const double b = static_cast<double>(reference::load(&expected[i]));
    const double of_sum = 1e-6 * 1.28 * static_cast<double>(s.k + 1);  // 0.01 * 128 a product
    CHECK(same(got[i], expected[i]) || std::fabs(a - b) <= of_sum + step * std::fabs(b), "%s at %zu: %g, expected %g",
          name(s).c_str(), i, a, b);
  }
}

template <class T>
void test_weight_only(const Size& s, Activation activation, bool has_bias, const Setting& setting) {
  check_weight_only(s, inputs<T>(s, false), integers(s.n * s.k), activation, has_bias, setting);
}

// In each row of x one value that is hard to split, or to multiply by 0, 1 and 100.
template <class T>
void test_special_x(const Setting& setting) {
  const Size s = {24, 70, 40};
  const float special[] = {INFINITY, -INFINITY, NAN, 3e38F, -3e38F, 1e-41F, 65504.0F, 0x1.8p-24F};
  std::vector<float> x = normals(static_cast<size_t>(s.m * s.k));
  for (int64_t r = 0; r < s.m; ++r) x[static_cast<size_t>(r * s.k + r * 7 % s.k)] = special[r % 8];
  const uint32_t payload = 0x7F800001U;  // a NaN whose upper half is that of an infinity
  std::memcpy(&x[static_cast<size_t>(2 * s.k + 14)], &payload, sizeof(payload));
  std::vector<int8_t> w = integers(s.n * s.k);
  for (int64_t c = 0; c < s.n; ++c) {
    for (int64_t i = 0; i < s.k; ++i) {
      if (c % 4 < 3) w[static_cast<size_t>(c * s.k + i)] = static_cast<int8_t>(c % 4 == 2 ? 100 : c % 4);
    }
  }
  check_weight_only(s, narrowed<T>(x), w, Activation::kNone, true, setting);
}

void test_weight_only_layers(const Setting& setting) {
  for (const Size& size : {Size{1, 1, 1}, Size{5, 19, 100}, Size{16, 9, 1000}, Size{17, 3, 31}, Size{70, 66, 96},
                           Size{20, 9, 44}, Size{33, 5, 56}}) {
    test_weight_only<float>(size, Activation::kNone, true, setting);
    test_weight_only<BFloat16>(size, Activation::kRelu, false, setting);
    test_weight_only<Float16>(size, Activation::kSilu, true, setting);
  }
  test_weight_only<float>({2, 3, 0}, Activation::kNone, true, setting);
  test_weight_only<float>({20, 3, 0}, Activation::kNone, true, setting);
  for_each_dtype([&](auto element) { test_special_x<decltype(element)>(setting); });
}

// Pairs of results are stored at once only where y allows that.
void test_unaligned_y(const Setting& setting) {
  const Size s = {20, 6, 40};
  Buffer<BFloat16> in(inputs<BFloat16>(s, false), setting.place);
  Buffer<int8_t> w(integers(s.n * s.k), setting.place);
  const cuda::Int8Weights weights = {s.n, s.k, cuda::operand_of(w.data(), s.n, s.k)};
  Buffer<BFloat16> y(static_cast<size_t>(s.m * s.n), Place::kStart);
  Buffer<BFloat16> shifted(static_cast<size_t>(s.m * s.n + 1), Place::kStart);
  for (BFloat16* to : {y.data(), shifted.data() + 1}) {
    const cuda::LinearOutput output = {to, DType::kBFloat16, s.n, nullptr, nullptr, Activation::kNone};
    require(cuda::launch_float_product<64, BFloat16>(Launcher(setting.descending), in.data(), s.m, weights, output));
  }
  const std::vector<BFloat16> expected = y.values();
  const std::vector<BFloat16> got(shifted.data() + 1, shifted.data() + 1 + s.m * s.n);
  CHECK_SAME(got, expected, name(s));
}

void test_tile_side() {
  CHECK(cuda::float_tile_side(64, 1 << 20) == 64, "half a large tile would be empty");
  CHECK(cuda::float_tile_side(128, 127 * 128) == 64, "too few large tiles");
  CHECK(cuda::float_tile_side(129, 63 * 128 + 1) == 128, "2 x 64 large tiles");
}

void run_all() {
  test_tile_side();
  test_every_int8<BFloat16>();
  test_every_int8<Float16>();
  for (const Setting& setting : kSettings) {
    test_sums(setting);
    test_weight_only_layers(setting);
    test_unaligned_y(setting);
  }
}

}  // namespace
}  // namespace kdq::test

int main() { return kdq::test::run_tests(kdq::test::run_all); }
