// Fake-quant kernels for GPUs against the reference: conversions, forward, quantize, dequantize, gradients.
#include "cuda/fake_quantize.h"
#include "cuda/fake_quantize_backward.h"
#include "support.h"

namespace kdq::test {
namespace {

#if !defined(__CUDACC__)  // a GPU has instructions for these

template <class T>
void same_narrowing(float value) {
  T expected;
  reference::store(&expected, value);
  const T got = {cuda::Element<T>::narrow(value)};
  CHECK(same(got, expected), "%a", static_cast<double>(value));
}

void test_conversions() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Float16 half = {static_cast<uint16_t>(bits)};
    const float value = reference::load(&half);
    CHECK(same(cuda::Element<Float16>::widen(half.bits), value), "%04x", bits);
    const Float16 next = {static_cast<uint16_t>(bits + 1)};
    const float between = 0.5F * (value + reference::load(&next));  // a tie
    for (float x : {value, between, std::nextafter(between, INFINITY), std::nextafter(between, -INFINITY)}) {
      same_narrowing<Float16>(x);
    }
    for (uint32_t low : {0U, 1U, 0x7FFFU, 0x8000U, 0x8001U, 0xFFFFU}) {
      same_narrowing<BFloat16>(reference::float_of(bits << 16 | low));
      same_narrowing<Float16>(reference::float_of(bits << 16 | low));
    }
  }
}

#endif

struct GridCase {
  ZeroPointKind kind;
  int32_t quant_min;
  int32_t quant_max;
};
constexpr GridCase kGrids[] = {
    {ZeroPointKind::kNone, -8, 7}, {ZeroPointKind::kInt32, 0, 255}, {ZeroPointKind::kFloat32, -128, 127}};

constexpr QuantShape kShapes[] = {
    {1, 1, 5003},  // per tensor, more than a block
    {3, 5, 7},     // an inner axis, chunks across channels
    {2, 4, 48},    // chunks within channels
    {1, 30, 16},   // groups
    {70, 24, 1},   // the last axis
    {37, 3, 2},    // columns that are no multiple of a chunk
    {2, 3, 2500},  // several pieces a run
    {40, 6, 4},    // columns, two pieces down
    {1, 1, 1},    {0, 2, 3},
};

std::string name(const QuantShape& s) {
  return "shape " + std::to_string(s.outer) + " x " + std::to_string(s.channels) + " x " + std::to_string(s.inner);
}

// A grid whose arrays live as long as it.
struct OwnedGrid {
  Buffer<float> scale;
  Buffer<int32_t> integers;
  Buffer<float> floats;
  QuantGrid grid;

  OwnedGrid(const GridCase& c, int64_t channels)
      : scale(static_cast<size_t>(channels), Place::kEnd),
        integers(static_cast<size_t>(channels), Place::kEnd),
        floats(static_cast<size_t>(channels), Place::kEnd) {
    for (int64_t i = 0; i < channels; ++i) {
      scale.data()[i] = 0.1F + 0.013F * static_cast<float>(i);
      integers.data()[i] = static_cast<int32_t>(100 + i);
      floats.data()[i] = -0.3F + 1.7F * static_cast<float>(i);
    }
    grid.scale = scale.data();
    grid.zero_point_kind = c.kind;
    if (c.kind == ZeroPointKind::kInt32) grid.zero_point = integers.data();
    if (c.kind == ZeroPointKind::kFloat32) grid.zero_point = floats.data();
    grid.quant_min = c.quant_min;
    grid.quant_max = c.quant_max;
  }
};

size_t elements(const QuantShape& s) { return static_cast<size_t>(s.outer * s.channels * s.inner); }

template <class T>
void test_forward(const QuantShape& shape, const GridCase& c, const Setting& setting) {
  const OwnedGrid owned(c, shape.channels);
  const std::vector<T> x = narrowed<T>(awkward(elements(shape)));
  std::vector<T> expected(x.size());
  require(fake_quantize(dtype_of<T>(), x.data(), expected.data(), shape, owned.grid, serial_executor()));
  Buffer<T> in(x, setting.place);
  Buffer<T> out(x.size(), setting.place);
  const Launcher launcher(setting.descending);
  run_watched(out, [&] {
    return cuda::launch_fake_quantize(launcher, dtype_of<T>(), in.data(), out.data(), shape, owned.grid);
  });
  CHECK_SAME(out.values(), expected, name(shape));
  require(cuda::launch_fake_quantize(launcher, dtype_of<T>(), in.data(), in.data(), shape, owned.grid));
  CHECK_SAME(in.values(), expected, name(shape) + " in place");
}

template <class T, class Q>
void test_quantize(QType qtype, const QuantShape& shape, const GridCase& c, const Setting& setting) {
  const OwnedGrid owned(c, shape.channels);
  const std::vector<T> x = narrowed<T>(awkward(elements(shape)));
  std::vector<Q> expected(x.size());
  require(quantize(dtype_of<T>(), x.data(), qtype, expected.data(), shape, owned.grid, serial_executor()));
  Buffer<T> in(x, setting.place);
  Buffer<Q> out(x.size(), setting.place);
  run_watched(out, [&] {
    return cuda::launch_quantize(Launcher(setting.descending), dtype_of<T>(), in.data(), qtype, out.data(), shape,
                                 owned.grid);
  });
  CHECK_SAME(out.values(), expected, name(shape));
}

template <class Q>
void test_dequantize(QType qtype, const QuantShape& shape, const GridCase& c, const Setting& setting) {
  const OwnedGrid owned(c, shape.channels);
  std::vector<Q> q(elements(shape));
  for (Q& value : q) value = static_cast<Q>(generator()());
  if (qtype == QType::kInt32) {
    for (Q& value : q) value = static_cast<Q>(value % 1000000);
  }
  std::vector<float> expected(q.size());
  require(dequantize(qtype, q.data(), expected.data(), shape, owned.grid, serial_executor()));
  Buffer<Q> in(q, setting.place);
  Buffer<float> out(q.size(), setting.place);
  run_watched(out, [&] {
    return cuda::launch_dequantize(Launcher(setting.descending), qtype, in.data(), out.data(), shape, owned.grid);
  });
  CHECK_SAME(out.values(), expected, name(shape));
}

// The size of what is added up for a channel's gradients, against which rounding is to be seen.
template <class T>
std::vector<double> magnitudes(const std::vector<T>& grad_y, const QuantShape& shape, const QuantGrid& grid) {
  std::vector<double> result(static_cast<size_t>(shape.channels), 1e-30);
  for (size_t i = 0; i < grad_y.size(); ++i) {
    const auto c = i / static_cast<size_t>(shape.inner) % static_cast<size_t>(shape.channels);
    result[c] += std::fabs(reference::load(&grad_y[i])) * (grid.quant_max - grid.quant_min);
  }
  return result;
}

template <class T>
void test_backward(const QuantShape& shape, const GridCase& c, const Setting& setting) {
  const OwnedGrid owned(c, shape.channels);
  const std::vector<T> x = narrowed<T>(normals(elements(shape), 3.0F));
  const std::vector<T> grad_y = narrowed<T>(normals(elements(shape)));
  std::vector<T> expected(x.size());
  const auto channels = static_cast<size_t>(shape.channels);
  std::vector<float> scale(channels);
  std::vector<float> zero_point(channels);
  require(fake_quantize_backward(dtype_of<T>(), grad_y.data(), x.data(), expected.data(), scale.data(),
                                 zero_point.data(), shape, owned.grid, serial_executor()));
  Buffer<T> in(x, setting.place);
  Buffer<T> grad(grad_y, setting.place);
  Buffer<T> out(x.size(), setting.place);
  Buffer<float> grad_scale(channels, setting.place);
  Buffer<float> grad_zero_point(channels, setting.place);
  Buffer<float> workspace(cuda::backward_workspace_bytes(shape) / sizeof(float), setting.place);
  const Launcher launcher(setting.descending);
  const auto backward = [&](T* grad_x, float* of_scale, float* of_zero_point) {
    return cuda::launch_fake_quantize_backward(launcher, dtype_of<T>(), grad.data(), in.data(), grad_x, of_scale,
                                               of_zero_point, shape, owned.grid, workspace.data());
  };
  run_watched(out, [&] { return backward(out.data(), grad_scale.data(), grad_zero_point.data()); });
  CHECK_SAME(out.values(), expected, name(shape));
  const std::vector<double> magnitude = magnitudes(grad_y, shape, owned.grid);
  const std::vector<float> first = grad_scale.values();
  for (size_t i = 0; i < channels; ++i) {
    const double scale_error = std::fabs(static_cast<double>(first[i]) - scale[i]);
    const double zero_point_error = std::fabs(static_cast<double>(grad_zero_point.values()[i]) - zero_point[i]);
    CHECK(scale_error <= 1e-6 * magnitude[i], "%s: %g", name(shape).c_str(), scale_error);
    CHECK(zero_point_error <= 1e-6 * magnitude[i], "%s: %g", name(shape).c_str(), zero_point_error);
  }
  require(backward(nullptr, grad_scale.data(), nullptr));
  CHECK_SAME(grad_scale.values(), first, name(shape) + " alone");
  require(backward(grad.data(), nullptr, nullptr));
  CHECK_SAME(grad.values(), expected, name(shape) + " in place");
}

void test_refusals() {
  const float x[4] = {};
  float y[4];
  const Launcher launcher(false);
  QuantGrid grid;
  refuses("scale", cuda::launch_fake_quantize(launcher, DType::kFloat32, x, y, {1, 1, 4}, grid));
  grid.scale = x;
  refuses("x:", cuda::launch_fake_quantize(launcher, DType::kFloat32, nullptr, y, {1, 1, 4}, grid));
  refuses("shape", cuda::launch_fake_quantize(launcher, DType::kFloat32, x, y, {1, -1, 4}, grid));
  refuses("uint8", cuda::launch_quantize(launcher, DType::kFloat32, x, QType::kUInt8, y, {1, 1, 4}, grid));
  refuses("q:", cuda::launch_dequantize(launcher, QType::kInt8, nullptr, y, {1, 1, 4}, grid));
  refuses("workspace", cuda::launch_fake_quantize_backward(launcher, DType::kFloat32, x, x, nullptr, y, nullptr,
                                                           {2, 1, 2}, grid, nullptr));
  grid.zero_point_kind = ZeroPointKind::kInt32;
  refuses("zero_point", cuda::launch_fake_quantize(launcher, DType::kFloat32, x, y, {1, 1, 4}, grid));
  grid.quant_min = grid.quant_max;
  refuses("quant_min", cuda::launch_fake_quantize(launcher, DType::kFloat32, x, y, {1, 1, 4}, grid));
}

void test_elementwise(const QuantShape& shape, const GridCase& c, const Setting& setting) {
  for_each_dtype([&](auto element) {
    using T = decltype(element);
    test_forward<T>(shape, c, setting);
    test_backward<T>(shape, c, setting);
    test_quantize<T, int32_t>(QType::kInt32, shape, c, setting);
    if (c.quant_min < 0) test_quantize<T, int8_t>(QType::kInt8, shape, c, setting);
    if (c.quant_min >= 0) test_quantize<T, uint8_t>(QType::kUInt8, shape, c, setting);
  });
}

void test_integers(const QuantShape& shape, const GridCase& c, const Setting& setting) {
  test_dequantize<int8_t>(QType::kInt8, shape, c, setting);
  test_dequantize<uint8_t>(QType::kUInt8, shape, c, setting);
  test_dequantize<int32_t>(QType::kInt32, shape, c, setting);
}

void run_all() {
#if !defined(__CUDACC__)
  test_conversions();
#endif
  test_refusals();
  for (const Setting& setting : kSettings) {
    for (const GridCase& c : kGrids) {
      for (const QuantShape& shape : kShapes) test_elementwise(shape, c, setting);
      for (const QuantShape& shape : kShapes) test_integers(shape, c, setting);
    }
  }
}

}  // namespace
}  // namespace kdq::test

int main() { return kdq::test::run_tests(kdq::test::run_all); }
