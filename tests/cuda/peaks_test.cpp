// The loops that measure a GPU: that they compute what they are said to, as often as they are said to. Their speed is
// for a GPU to tell.
#include "cuda/peaks.h"

#include "support.h"

namespace kdq::test {
namespace {

constexpr int64_t kBlocks = 2;

float value_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

double int8_words(uint32_t a, uint32_t b) {
  double sum = 0;
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i & 255U) * static_cast<int8_t>(b >> i & 255U);
  return sum;
}

double common_bits(uint32_t a, uint32_t b) { return __builtin_popcount(a & b); }

double bf16_words(uint32_t a, uint32_t b) {
  const double low = value_of(a << 16) * value_of(b << 16);
  return low + value_of(a & 0xFFFF0000U) * value_of(b & 0xFFFF0000U);
}

// Of a lane, after so many steps on one sum: by PTX it has rows lane / 4 and lane / 4 + 8 of a, columns 2 (lane % 4)
// and the next of b. Words of k: a lane's words 0 and 2 of a are of its first row, 1 and 3 of the second.
template <class Loop, class WordProduct>
double products(int lane, int64_t steps, WordProduct product) {
  const cuda::PeakOperands operands = cuda::peak_operands<Loop>();
  double sum = 0;
  for (int second = 0; second < 2; ++second) {
    for (int col = lane % 4 * 2; col < lane % 4 * 2 + 2; ++col) {
      for (int k = 0; k < 8; ++k) {
        sum += product(operands.a[lane / 4 * 4 + k % 4][second + k / 4 * 2], operands.b[col * 4 + k % 4][k / 4]);
      }
    }
  }
  return sum * static_cast<double>(steps);
}

double multiply_adds(int lane, int64_t steps) {
  const cuda::PeakOperands operands = cuda::peak_operands<cuda::Float32Loop>();
  double sum = 0;
  for (int64_t s = 0; s < steps; ++s) sum = sum * value_of(operands.a[lane][0]) + value_of(operands.b[lane][0]);
  return 4 * sum;
}

double expected(cuda::PeakLoop loop, int lane, int64_t steps) {
  switch (loop) {
    case cuda::PeakLoop::kInt8:
      return products<cuda::Int8Loop>(lane, steps, int8_words);
    case cuda::PeakLoop::kBinary:
      return products<cuda::BinaryLoop>(lane, steps, common_bits);
    case cuda::PeakLoop::kBFloat16:
      return products<cuda::BFloat16Loop>(lane, steps, bf16_words);
    case cuda::PeakLoop::kFloat32:
      break;
  }
  return multiply_adds(lane, steps);
}

void test_arithmetic(cuda::PeakLoop loop, int64_t operations_of_a_step, const Setting& setting) {
  const Launcher launcher(setting.descending);
  for (int64_t steps : {1, 3}) {
    Buffer<float> out(kBlocks * cuda::kPeakThreads, setting.place);
    int64_t operations = 0;
    run_watched(out,
                [&] { return cuda::launch_arithmetic_peak(launcher, loop, kBlocks, steps, out.data(), &operations); });
    const int64_t all_steps = steps * kBlocks * cuda::kPeakSums * (cuda::kPeakThreads / cuda::kWarp);
    CHECK(operations == all_steps * operations_of_a_step, "loop %d", static_cast<int>(loop));
    const std::vector<float> got = out.values();
    for (size_t i = 0; i < got.size(); ++i) {
      const double want = cuda::kPeakSums * expected(loop, static_cast<int>(i) % cuda::kWarp, steps);
      CHECK(std::fabs(got[i] - want) <= 1e-4 * std::fabs(want) + 1e-3, "loop %d, thread %zu: %g, expected %g",
            static_cast<int>(loop), i, static_cast<double>(got[i]), want);
    }
  }
}

void test_reading(int64_t pieces, const Setting& setting) {
  const size_t n = static_cast<size_t>(4 * pieces);
  std::vector<uint32_t> words(n);
  for (uint32_t& word : words) word = static_cast<uint32_t>(generator()());
  Buffer<uint32_t> source(words, setting.place);
  Buffer<uint32_t> out(kBlocks * cuda::kPeakThreads, setting.place);
  const Launcher launcher(setting.descending);
  run_watched(out, [&] {
    return cuda::launch_read_peak(launcher, source.data(), static_cast<int64_t>(source.bytes()), kBlocks, out.data());
  });
  uint32_t want = 0;
  uint32_t got = 0;
  for (uint32_t word : words) want ^= word;
  for (uint32_t word : out.values()) got ^= word;
  CHECK(got == want, "%lld pieces", static_cast<long long>(pieces));
}

void test_refusals() {
  const Launcher launcher(false);
  float out[1];
  alignas(16) uint32_t source[8] = {};
  int64_t operations = 0;
  refuses("blocks", cuda::launch_arithmetic_peak(launcher, cuda::PeakLoop::kInt8, 0, 1, out, &operations));
  refuses("steps", cuda::launch_arithmetic_peak(launcher, cuda::PeakLoop::kInt8, 1, 0, out, &operations));
  refuses("out", cuda::launch_arithmetic_peak(launcher, cuda::PeakLoop::kInt8, 1, 1, nullptr, &operations));
  refuses("loop", cuda::launch_arithmetic_peak(launcher, static_cast<cuda::PeakLoop>(4), 1, 1, out, &operations));
  refuses("source", cuda::launch_read_peak(launcher, nullptr, 16, 1, source));
  refuses("source", cuda::launch_read_peak(launcher, source, 20, 1, source));
  refuses("source", cuda::launch_read_peak(launcher, source + 1, 16, 1, source));
}

void run_all() {
  test_refusals();
  for (const Setting& setting : kSettings) {
    test_arithmetic(cuda::PeakLoop::kInt8, 2 * 16 * 8 * 32, setting);
    test_arithmetic(cuda::PeakLoop::kBinary, 2 * 16 * 8 * 256, setting);
    test_arithmetic(cuda::PeakLoop::kBFloat16, 2 * 16 * 8 * 16, setting);
    test_arithmetic(cuda::PeakLoop::kFloat32, 2 * 4 * 32, setting);
    for (int64_t pieces : {1, 511, 4096, 5000}) test_reading(pieces, setting);
  }
}

}  // namespace
}  // namespace kdq::test

int main() { return kdq::test::run_tests(kdq::test::run_all); }
