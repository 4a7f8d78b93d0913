// The products for Hopper: where they expect elements to lie, by plain formulas, and results against the reference.
#include "cuda/binary_gemm.h"
#include "cuda/int8_gemm.h"
#include "products.h"

#if defined(__CUDACC__)
#include <unistd.h>
#endif

namespace kdq::test {
namespace {

// ---- where elements lie
// ----------------------------------------------------------------------------------------------

void test_swizzle() {
  for (int address = 0; address < cuda::kHopperCols * cuda::kTileRowBytes; ++address) {
    const int low = address % 16;
    const int piece = address / 16 % 8;
    const int row = address / 128 % 8;
    const int expected = address / 128 * 128 + (piece ^ row) * 16 + low;
    CHECK(cuda::swizzled(address / 128, address % 128) == expected, "of byte %d", address);
  }
}

// The fields, read back.
void test_operands() {
  for (uint32_t address = 0; address < 227 * 1024; address += 16) {
    const uint64_t operand = cuda::wgmma_operand(address);
    CHECK((operand & 0x3FFF) * 16 == address, "of %u", address);
    CHECK((operand >> 16 & 0x3FFF) == 1, "of %u", address);
    CHECK((operand >> 32 & 0x3FFF) * 16 == 8 * 128, "of %u", address);
    CHECK(operand >> 62 == 1, "of %u", address);
    CHECK((operand & 0x3FFFC000C000C000) == 0, "of %u", address);
  }
}

// PTX's figure the other way round: who has an element, and as which of its sums.
void test_sums() {
  for (int row = 0; row < 64; ++row) {
    for (int col = 0; col < 256; ++col) {
      const int warp = row / 16;
      const int lane = row % 8 * 4 + col % 8 / 2;
      const int sum = col / 8 * 4 + row % 16 / 8 * 2 + col % 2;
      const int thread = 32 * warp + lane;
      CHECK(cuda::wgmma_row(thread, sum) == row, "of %d, %d", row, col);
      CHECK(cuda::wgmma_col(thread, sum) == col, "of %d, %d", row, col);
    }
  }
}

// Every tile once; and the tiles that blocks work on at a time are few rows and columns of tiles.
void test_tiles() {
  for (const auto& [down, across] : {std::pair{1, 1}, {1, 50}, {50, 1}, {16, 3}, {17, 5}, {40, 40}}) {
    std::vector<int> seen(static_cast<size_t>(down * across));
    for (int64_t tile = 0; tile < down * across; ++tile) {
      const cuda::TilePlace place = cuda::tile_place(tile, down, across);
      CHECK(place.down >= 0 && place.down < down && place.across >= 0 && place.across < across, "%d x %d", down,
            across);
      CHECK(++seen[static_cast<size_t>(place.down * across + place.across)] == 1, "%d x %d", down, across);
      CHECK(place.down / cuda::kTileGroup == tile / (cuda::kTileGroup * across), "%d x %d", down, across);
    }
  }
}

// ---- results
// ---------------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)

std::vector<Launcher> launchers() { return {Launcher(false)}; }

#else

// Every order of threads, everything late or early.
std::vector<Launcher> launchers() {
  std::vector<Launcher> result;
  for (const emulator::Timing& timing : emulator::kTimings) {
    for (emulator::Order order : emulator::kOrders) result.emplace_back(order, timing);
  }
  return result;
}

#endif

void test_int8(const Size& s, const Launcher& launcher) {
  const std::vector<int8_t> a = integers(s.m * s.k);
  const std::vector<int8_t> b = integers(s.n * s.k);
  const std::vector<char> weight = packed_weight(b, s.n, s.k);
  std::vector<int32_t> expected(static_cast<size_t>(s.m * s.n));
  require(int8_matmul(a.data(), s.m, s.k, weight.data(), weight.size(), expected.data(), serial_executor()));
  Buffer<int8_t> of_a(a, Place::kEnd);
  Buffer<int8_t> of_b(b, Place::kEnd);
  Buffer<int32_t> out(expected.size(), Place::kStart);
  run_watched(out, [&] {
    return cuda::launch_hopper(launcher, cuda::Int8Product(), cuda::operand_of(of_a.data(), s.m, s.k),
                               cuda::operand_of(of_b.data(), s.n, s.k), cuda::Int32Output{out.data(), s.n});
  });
  CHECK_SAME(out.values(), expected, name(s));
}

// The three kinds of results of a binary product.
void test_binary(const Size& s, const Launcher& launcher) {
  const std::vector<uint64_t> a = packed(normals(static_cast<size_t>(s.m * s.k)), s.m, s.k);
  const std::vector<uint64_t> b = packed(normals(static_cast<size_t>(s.n * s.k)), s.n, s.k);
  Buffer<uint64_t> of_a(a, Place::kEnd);
  Buffer<uint64_t> of_b(b, Place::kEnd);
  const auto k = static_cast<uint32_t>(s.k);
  const auto launch = [&](const auto& output) {
    return cuda::launch_hopper(launcher, cuda::BinaryProduct(),
                               cuda::operand_of(of_a.data(), s.m, cuda::binary_row_bytes(s.k)),
                               cuda::operand_of(of_b.data(), s.n, cuda::binary_row_bytes(s.k)), output);
  };

  std::vector<int32_t> dots(static_cast<size_t>(s.m * s.n));
  require(binary_matmul(a.data(), b.data(), s.m, s.n, s.k, dots.data(), serial_executor()));
  Buffer<int32_t> out(dots.size(), Place::kStart);
  run_watched(out, [&] { return launch(cuda::DotOutput{out.data(), s.n, k}); });
  CHECK_SAME(out.values(), dots, name(s));

  const std::vector<float> scale = normals(static_cast<size_t>(s.n));
  const std::vector<float> bias = normals(static_cast<size_t>(s.n));
  std::vector<float> y(dots.size());
  BinaryLinear linear;
  linear.dtype = DType::kFloat32;
  linear.x_bits = a.data();
  linear.y = y.data();
  linear.m = s.m;
  linear.n = s.n;
  linear.k = s.k;
  linear.weight_bits = b.data();
  linear.weight_scale = scale.data();
  linear.bias = bias.data();
  require(binary_linear(linear, serial_executor()));
  Buffer<float> of_scale(scale, Place::kEnd);
  Buffer<float> of_bias(bias, Place::kEnd);
  Buffer<float> out_y(y.size(), Place::kStart);
  run_watched(out_y, [&] {
    return launch(cuda::ScaledDotOutput{out_y.data(), DType::kFloat32, s.n, k, of_scale.data(), of_bias.data()});
  });
  CHECK_SAME(out_y.values(), y, name(s));

  std::vector<int32_t> threshold(static_cast<size_t>(s.n));
  for (size_t i = 0; i < threshold.size(); ++i) threshold[i] = static_cast<int32_t>(i % 17) - 8;
  std::vector<uint64_t> y_bits(words(s.m, s.n));
  BinaryThreshold hidden;
  hidden.x_bits = a.data();
  hidden.y_bits = y_bits.data();
  hidden.m = s.m;
  hidden.n = s.n;
  hidden.k = s.k;
  hidden.weight_bits = b.data();
  hidden.threshold = threshold.data();
  require(binary_threshold(hidden, serial_executor()));
  Buffer<int32_t> of_threshold(threshold, Place::kEnd);
  Buffer<uint64_t> out_bits(y_bits.size(), Place::kStart);
  run_watched(out_bits, [&] {
    return launch(cuda::ThresholdOutput{reinterpret_cast<uint8_t*>(out_bits.data()), cuda::binary_row_bytes(s.n), s.n,
                                        k, of_threshold.data()});
  });
  CHECK_SAME(out_bits.values(), y_bits, name(s));
}

// int8_linear, statically quantized: rows are quantized as there, then multiplied by this kernel.
void test_static_linear(const Size& s, const Launcher& launcher) {
  constexpr float kInputScale = 0.02F;
  constexpr int32_t kZeroPoint = 101;
  constexpr int32_t kQuantMax = 200;
  const std::vector<float> x = normals(static_cast<size_t>(s.m * s.k));
  const std::vector<int8_t> w = integers(s.n * s.k);
  const std::vector<char> weight = packed_weight(w, s.n, s.k);
  const std::vector<float> scale(static_cast<size_t>(s.n), 0.003F);
  std::vector<float> expected(static_cast<size_t>(s.m * s.n));
  Int8Linear on_cpu = linear_on_cpu(s, x, weight, scale, &expected);
  on_cpu.is_static = true;
  on_cpu.input_scale = kInputScale;
  on_cpu.input_zero_point = kZeroPoint;
  on_cpu.input_quant_max = kQuantMax;
  require(int8_linear(on_cpu, serial_executor()));

  Buffer<float> in(x, Place::kEnd);
  Buffer<int8_t> of_w(w, Place::kEnd);
  Buffer<float> of_scale(scale, Place::kEnd);
  Buffer<int8_t> q(x.size(), Place::kEnd);
  Buffer<float> row_scale(static_cast<size_t>(s.m), Place::kEnd);
  Buffer<float> out(expected.size(), Place::kStart);
  const cuda::StaticGrid grid = {nullptr, kInputScale, nullptr, kZeroPoint, kQuantMax};
  require(cuda::launch_quantize_rows_static(launcher, DType::kFloat32, in.data(), s.m, s.k, grid, q.data(),
                                            row_scale.data()));
  const cuda::LinearOutput to = {out.data(), DType::kFloat32, s.n, of_scale.data(), nullptr, Activation::kNone};
  run_watched(out, [&] {
    return cuda::launch_hopper(launcher, cuda::StaticInt8Product{grid}, cuda::operand_of(q.data(), s.m, s.k),
                               cuda::operand_of(of_w.data(), s.n, s.k), cuda::ScaledOutput{to, row_scale.data()});
  });
  CHECK_SAME(out.values(), expected, name(s));
}

// What the copy engine cannot read, and what is not there.
void test_fits() {
  alignas(16) uint8_t bytes[64] = {};
  const auto fits = [](const cuda::Operand& operand) { return cuda::fits_hopper(operand, operand); };
  CHECK(fits(cuda::operand_of(bytes, 2, 32)), "16 divides all");
  CHECK(!fits(cuda::operand_of(bytes, 2, 24)), "16 does not divide the row");
  CHECK(!fits(cuda::operand_of(bytes + 8, 2, 16)), "16 does not divide the address");
  CHECK(!fits(cuda::operand_of(bytes, 0, 16)), "no rows");
  CHECK(!fits(cuda::operand_of(bytes, 2, 0)), "no k");
}

// On a GPU that has this kernel, where KDQ_CUDA_HOPPER has a value.
class CountingLauncher : public Launcher {
 public:
  CountingLauncher(const char* setting, int* count) : Launcher(false), setting_(setting), count_(count) {}
  Status use_hopper(bool* use) const { return cuda::parse_use_hopper(setting_, use); }
  template <class Kernel>
  Status run_resident(const Kernel&, int64_t) const {
    ++*count_;
    return {};
  }

 private:
  const char* setting_;
  int* count_;
};

// How often int8_matmul takes this kernel.
int times_taken(const char* setting, const Size& s) {
  Buffer<int8_t> a(integers(s.m * s.k), Place::kStart);
  Buffer<int8_t> b(integers(s.n * s.k), Place::kStart);
  Buffer<int32_t> out(static_cast<size_t>(s.m * s.n), Place::kStart);
  int count = 0;
  const CountingLauncher launcher(setting, &count);
  require(cuda::launch_int8_matmul(launcher, a.data(), b.data(), s.m, s.n, s.k, out.data(), nullptr));
  return count;
}

// Only if it is to, and not for few rows, nor for rows it cannot read.
void test_choice() {
  CHECK(times_taken("1", {20, 9, 32}) == 1, "asked for");
  CHECK(times_taken("0", {20, 9, 32}) == 0, "refused");
  CHECK(times_taken(nullptr, {20, 9, 32}) == (cuda::kUseHopper ? 1 : 0), "not set");
  CHECK(times_taken("1", {20, 9, 24}) == 0, "rows that the copy engine cannot read");
  CHECK(times_taken("1", {16, 9, 32}) == 0, "few rows");
  bool use = false;
  const Status wrong = cuda::parse_use_hopper("yes", &use);
  CHECK(wrong.message() == "KDQ_CUDA_HOPPER: expected 0 or 1, got 'yes'", "%s", wrong.message().c_str());
}

void run_all() {
  test_swizzle();
  test_operands();
  test_sums();
  test_tiles();
  test_fits();
  test_choice();
  for (const Launcher& launcher : launchers()) {
    // Less than a tile and less than a step; ragged everywhere; more steps than stages, whole tiles.
    for (const Size& size : {Size{1, 1, 16}, Size{130, 259, 144}, Size{128, 256, 768}}) {
      test_int8(size, launcher);
      test_binary({size.m, size.n, size.k * 8 - 20}, launcher);
    }
    test_static_linear({20, 40, 272}, launcher);
  }
  // Several tiles of several steps a block.
  const Launcher launcher = launchers()[0];
  test_int8({300, 520, 272}, launcher);
  test_binary({300, 520, 2170}, launcher);
#if defined(__CUDACC__)
  test_int8({2100, 4200, 144}, launcher);  // for a GPU's many blocks too
  test_binary({2100, 4200, 1100}, launcher);
#endif
}

}  // namespace
}  // namespace kdq::test

int main() {
#if defined(__CUDACC__)
  alarm(300);  // a barrier that is wrong hangs
  if (!kdq::cuda::StreamLauncher(nullptr).is_hopper()) {
    std::printf("no GPU of compute capability 9.0: nothing was tested\n");
    return 77;
  }
#endif
  return kdq::test::run_tests(kdq::test::run_all);
}
