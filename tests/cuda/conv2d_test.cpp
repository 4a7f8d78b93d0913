// Convolutions for GPUs against the CPU's.
#include <algorithm>

#include "cuda/binary_conv2d.h"
#include "cuda/int8_conv2d.h"
#include "cuda/transpose_images.h"
#include "products.h"

namespace kdq::test {
namespace {

struct Case {
  Conv2dShape
      shape;  // images, channels, height, width; kernel, stride, padding, dilation (of the height, of the width)
  int64_t n;
};

std::string name(const Case& c) {
  const Conv2dShape& s = c.shape;
  const auto pair = [](int64_t a, int64_t b) { return std::to_string(a) + "x" + std::to_string(b); };
  return std::to_string(s.images) + " images of " + pair(s.height, s.width) + "x" + std::to_string(s.channels) +
         ", kernel " + pair(s.kernel_height, s.kernel_width) + ", stride " + pair(s.stride_height, s.stride_width) +
         ", padding " + pair(s.padding_height, s.padding_width) + ", dilation " +
         pair(s.dilation_height, s.dilation_width) + ", n " + std::to_string(c.n);
}

struct Sizes {
  int64_t outputs = 0;  // of all images
  int64_t inputs = 0;   // of an image
  int64_t k = 0;
};

Sizes sizes_of(const Conv2dShape& s) {
  int64_t height = 0;
  int64_t width = 0;
  require(conv2d_output(s, &height, &width));
  return {s.images * height * width, s.height * s.width * s.channels, s.kernel_height * s.kernel_width * s.channels};
}

// Normals; NaN in the second image and inf in the third, at its last element, if there are so many. At least one, so
// that there is a pointer.
template <class T>
std::vector<T> images(const Conv2dShape& s) {
  const auto inputs = static_cast<size_t>(sizes_of(s).inputs);
  std::vector<float> values = normals(std::max<size_t>(static_cast<size_t>(s.images) * inputs, 1));
  if (inputs > 0 && s.images > 1) values[inputs + inputs / 2] = NAN;
  if (inputs > 0 && s.images > 2) values[3 * inputs - 1] = INFINITY;
  return narrowed<T>(values);
}

// ---- int8 ----------------------------------------------------------------------------------------------------------

// Dynamic activations, static ones by numbers, or by numbers in device memory.
enum class Input { kDynamic, kStatic, kStaticAt };
constexpr Input kInputs[] = {Input::kDynamic, Input::kStatic, Input::kStaticAt};

template <class T>
void test_int8(const Case& c, Input input, const Setting& setting) {
  constexpr float kInputScale = 0.02F;
  constexpr int32_t kZeroPoint = 101;
  constexpr int32_t kQuantMax = 200;
  const Sizes sizes = sizes_of(c.shape);
  const std::vector<T> x = images<T>(c.shape);
  const std::vector<int8_t> w = integers(c.n * sizes.k);
  const std::vector<char> packed = packed_weight(w, c.n, sizes.k);
  std::vector<float> scale(static_cast<size_t>(c.n));
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = 0.001F + 1e-5F * static_cast<float>(i);
  const std::vector<float> bias = normals(scale.size());
  std::vector<T> expected(static_cast<size_t>(sizes.outputs * c.n));
  kdq::Int8Conv2d on_cpu{c.shape, linear_on_cpu({sizes.outputs, c.n, sizes.k}, x, packed, scale, &expected)};
  on_cpu.layer.bias = bias.data();
  on_cpu.layer.activation = Activation::kRelu;
  on_cpu.layer.is_static = input != Input::kDynamic;
  on_cpu.layer.input_scale = kInputScale;
  on_cpu.layer.input_zero_point = kZeroPoint;
  on_cpu.layer.input_quant_max = kQuantMax;
  require(int8_conv2d(on_cpu, serial_executor()));

  cuda::Int8ConvPlan plan;
  require(cuda::plan_int8_conv2d(c.shape, c.n, &plan));
  Buffer<T> in(x, setting.place);
  Buffer<int8_t> of_w(w, setting.place);
  Buffer<float> of_scale(scale, setting.place);
  Buffer<float> of_bias(bias, setting.place);
  Buffer<T> out(expected.size(), setting.place);
  Buffer<char> workspace(plan.bytes, setting.place);
  Buffer<float> input_scale(std::vector<float>{kInputScale}, setting.place);
  Buffer<int32_t> zero_point(std::vector<int32_t>{kZeroPoint}, setting.place);
  cuda::Int8Conv2d args{c.shape, {}};
  cuda::Int8Linear& layer = args.layer;
  layer.dtype = dtype_of<T>();
  layer.x = in.data();
  layer.y = out.data();
  layer.n = c.n;
  layer.weight = of_w.data();
  layer.weight_scale = of_scale.data();
  layer.bias = of_bias.data();
  layer.activation = Activation::kRelu;
  layer.workspace = workspace.data();
  layer.is_static = input != Input::kDynamic;
  layer.input_quant_max = kQuantMax;
  if (input == Input::kStatic) layer.input_scale = kInputScale;
  if (input == Input::kStatic) layer.input_zero_point = kZeroPoint;
  if (input == Input::kStaticAt) layer.input_scale_at = input_scale.data();
  if (input == Input::kStaticAt) layer.input_zero_point_at = zero_point.data();
  run_watched(out, [&] { return cuda::launch_int8_conv2d(Launcher(setting.descending), args); });
  CHECK_SAME(out.values(), expected, name(c));
}

// ---- binary --------------------------------------------------------------------------------------------------------

template <class T>
void test_binary(const Case& c, const Setting& setting) {
  const Conv2dShape& s = c.shape;
  const Sizes sizes = sizes_of(s);
  const int64_t taps = s.kernel_height * s.kernel_width;
  const std::vector<T> x = images<T>(s);
  const std::vector<uint64_t> w = packed(normals(static_cast<size_t>(c.n * sizes.k)), c.n * taps, s.channels);
  const std::vector<float> scale = normals(static_cast<size_t>(c.n));
  const std::vector<float> bias = normals(scale.size());
  std::vector<T> expected(static_cast<size_t>(sizes.outputs * c.n));
  BinaryConv2d args;
  args.shape = s;
  args.layer.dtype = dtype_of<T>();
  args.layer.n = c.n;
  const auto point_to = [&](const T* values, const uint64_t* weight, const float* of_scale, const float* of_bias,
                            T* y) {
    args.layer.x = values;
    args.layer.weight_bits = weight;
    args.layer.weight_scale = of_scale;
    args.layer.bias = of_bias;
    args.layer.y = y;
  };
  point_to(x.data(), w.data(), scale.data(), bias.data(), expected.data());
  require(binary_conv2d(args, serial_executor()));

  cuda::BinaryConvPlan plan;
  require(cuda::plan_binary_conv2d(args, &plan));
  Buffer<T> in(x, setting.place);
  Buffer<uint64_t> weight(w, setting.place);
  Buffer<float> of_scale(scale, setting.place);
  Buffer<float> of_bias(bias, setting.place);
  Buffer<T> out(expected.size(), setting.place);
  Buffer<char> workspace(plan.bytes, setting.place);
  point_to(in.data(), weight.data(), of_scale.data(), of_bias.data(), out.data());
  run_watched(out, [&] { return cuda::launch_binary_conv2d(Launcher(setting.descending), args, workspace.data()); });
  CHECK_SAME(out.values(), expected, name(c));
}

// ---- the rest ------------------------------------------------------------------------------------------------------

template <class T>
void test_transpose(int64_t count, int64_t rows, int64_t columns, const Setting& setting) {
  std::vector<T> x(static_cast<size_t>(count * rows * columns));
  for (T& value : x) value = static_cast<T>(generator()());
  std::vector<T> expected(x.size());
  require(transpose_images(sizeof(T), x.data(), count, rows, columns, expected.data(), serial_executor()));
  Buffer<T> in(x, setting.place);
  Buffer<T> out(x.size(), setting.place);
  run_watched(out, [&] {
    return cuda::launch_transpose_images(Launcher(setting.descending), sizeof(T), in.data(), count, rows, columns,
                                         out.data());
  });
  CHECK(out.values() == expected, "%d images of %d x %d", static_cast<int>(count), static_cast<int>(rows),
        static_cast<int>(columns));
}

// By every small number, powers of two and their neighbours; around multiples, where a quotient changes.
void test_divisors() {
  std::vector<int64_t> divisors;
  for (int64_t i = 1; i < 300; ++i) divisors.push_back(i);
  for (int64_t power = 512; power <= INT32_MAX; power *= 2) {
    for (int64_t i : {power - 1, power, power + 1}) divisors.push_back(i);
  }
  divisors.push_back(INT32_MAX);
  for (int64_t divisor : divisors) {
    const cuda::Divisor by = cuda::divisor_of(divisor);
    for (int64_t i = 0; i < 200; ++i) {
      const int64_t multiple = static_cast<int64_t>(generator()() >> 1) / divisor * divisor;
      for (int64_t n : {multiple - 1, multiple, multiple + 1, int64_t{INT32_MAX} - i}) {
        if (n < 0 || n > INT32_MAX) continue;
        CHECK(by.quotient(static_cast<uint32_t>(n)) == n / divisor, "%lld / %lld", static_cast<long long>(n),
              static_cast<long long>(divisor));
      }
    }
  }
}

void test_int8_refusals() {
  const Launcher launcher(false);
  const int8_t some[16] = {};
  cuda::Int8Conv2d args{{1, 4, 2, 2}, {}};
  const auto run = [&] { return cuda::launch_int8_conv2d(launcher, args); };
  args.layer.n = 1;
  refuses("x: expected a pointer", run());
  args.layer.x = some;
  refuses("weight: expected a pointer", run());
  args.layer.weight = some;
  refuses("weight_scale: expected a pointer", run());
  args.layer.weight_scale = reinterpret_cast<const float*>(some);
  refuses("y: expected a pointer", run());
  args.layer.y = &args;
  refuses("workspace: expected a pointer", run());
  args.layer.is_static = true;
  args.layer.input_scale = 0.0F;
  refuses("input_scale:", run());
  args.shape.channels = kInt8StaticMaxK + 1;
  refuses("x: K = 65536 would overflow", run());
  args.shape = {1, 4, 2, 2, 3, 3};
  refuses("x: height 2 and its padding make 2", run());
  args.shape = {1, 1, 1 << 16, 1 << 15};
  refuses("x: expected less than 2^31 outputs", run());
  args.shape = {1, 1 << 12, 1, 1 << 20};
  refuses("x: expected lines of less than 2^31 bytes", run());
}

void test_binary_refusals() {
  const Launcher launcher(false);
  uint64_t some[2] = {};
  BinaryConv2d args;
  args.shape = {1, 4, 2, 2};
  args.layer.n = 1;
  void* workspace = nullptr;
  const auto run = [&] { return cuda::launch_binary_conv2d(launcher, args, workspace); };
  refuses("weight_bits: expected a pointer", run());
  args.layer.weight_bits = some;
  refuses("x: expected a pointer", run());
  args.layer.x = some;
  refuses("y: expected a pointer", run());
  args.layer.y = some;
  refuses("weight_scale: expected a pointer", run());
  args.layer.weight_scale = reinterpret_cast<const float*>(some);
  refuses("workspace: expected a pointer", run());
  args.shape.stride_width = 0;
  refuses("stride: expected 1", run());
  args.shape = {1, 1, 1 << 15, 1 << 14, 1 << 15, 1 << 14};
  refuses("kernel_size: expected windows of less than 2^31 bytes", run());
  refuses("element_bytes: expected 2 or 4, got 8", cuda::launch_transpose_images(launcher, 8, some, 1, 1, 1, some));
  refuses("y: expected a pointer", cuda::launch_transpose_images(launcher, 4, some, 1, 1, 1, nullptr));
}

// Pixels of 1, 3, 16, 20, 64 and 70 channels, so that bytes lie together in ones, fours, eights and sixteens; with and
// without padding, gaps and overlaps; windows wholly in the padding; less than a tile and several, of rows and columns.
const Case kCases[] = {
    {{1, 1, 1, 1}, 1},
    {{3, 3, 9, 7, 3, 3, 1, 1, 1, 1, 1, 1}, 5},
    {{1, 3, 17, 18, 7, 7, 2, 2, 3, 3, 1, 1}, 16},
    {{4, 16, 6, 6, 1, 1, 2, 2, 0, 0, 1, 1}, 33},
    {{2, 16, 5, 9, 3, 3, 1, 1, 1, 1, 1, 1}, 9},
    {{1, 20, 4, 12, 2, 5, 1, 3, 0, 4, 1, 3}, 8},
    {{1, 64, 12, 13, 3, 3, 1, 1, 1, 1, 1, 1}, 130},
    {{2, 70, 5, 6, 3, 2, 2, 1, 1, 2, 1, 2}, 10},
    {{1, 1, 2, 3, 2, 2, 1, 1, 5, 4, 2, 2}, 3},
    {{3, 128, 4, 4, 3, 3, 1, 1, 4, 4, 2, 2}, 7},
    {{2, 5, 0, 3, 2, 2, 1, 1, 2, 1, 1, 1}, 3},
    {{0, 3, 8, 8, 3, 3, 1, 1, 0, 0, 1, 1}, 4},
    {{2, 3, 8, 8, 3, 3, 1, 1, 0, 0, 1, 1}, 0},
};

// k in pieces, of which the last is shorter; lines longer than a warp takes.
const Case kLong[] = {
    {{1, 240, 3, 3, 3, 3, 1, 1, 1, 1, 1, 1}, 9},
    {{2, 171, 2, 8, 3, 5, 1, 1, 1, 2, 1, 1}, 4},
};

void run_all() {
  test_divisors();
  test_int8_refusals();
  test_binary_refusals();
  for (const Setting& setting : kSettings) {
    for (const Case& c : kCases) {
      for (Input input : kInputs) test_int8<float>(c, input, setting);
      test_binary<float>(c, setting);
    }
    for (const Case& c : kLong) {
      CHECK(cuda::splits_of_tiles(sizes_of(c.shape).outputs, c.n, sizes_of(c.shape).k) > 1, "k in pieces");
      for (Input input : kInputs) test_int8<Float16>(c, input, setting);
      test_binary<Float16>(c, setting);
    }
    for (Input input : kInputs) test_int8<BFloat16>(kCases[1], input, setting);
    test_binary<BFloat16>(kCases[7], setting);
    for (int64_t columns : {1, 31, 70}) {
      test_transpose<uint32_t>(2, 33, columns, setting);
      test_transpose<uint16_t>(3, 5, columns, setting);
    }
    test_transpose<uint32_t>(0, 33, 5, setting);
  }
}

}  // namespace
}  // namespace kdq::test

int main() { return kdq::test::run_tests(kdq::test::run_all); }
