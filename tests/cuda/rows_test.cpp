// Kernels for GPUs that work a row at a time, against the reference: dynamic quantization, binarization, its gradients.
#include "cuda/binarize_rows.h"
#include "cuda/quantize_rows.h"
#include "support.h"

namespace kdq::test {
namespace {

constexpr int64_t kRows = 9;

// Rows of zeros, of denormals, with NaN and inf in them, and of huge values, among others.
template <class T>
std::vector<T> awkward_rows(int64_t cols) {
  std::vector<float> values = normals(static_cast<size_t>(kRows * cols));
  const auto row = [&](int64_t r) { return values.begin() + r * cols; };
  std::fill(row(1), row(2), 0.0F);
  for (auto i = row(2); i < row(3); ++i) *i *= 1e-41F;
  if (cols > 0) *(row(4) - 1) = NAN;
  if (cols > 0) *row(5) = -INFINITY;
  for (auto i = row(6); i < row(7); ++i) *i *= 1e38F;
  return narrowed<T>(values);
}

std::string name(int64_t cols) { return std::to_string(cols) + " columns"; }

template <class T>
void test_quantize(int64_t cols, const Setting& setting) {
  const std::vector<T> x = awkward_rows<T>(cols);
  std::vector<int8_t> expected(x.size());
  std::vector<float> expected_scale(kRows);
  require(
      quantize_rows(dtype_of<T>(), x.data(), kRows, cols, expected.data(), expected_scale.data(), serial_executor()));
  Buffer<T> in(x, setting.place);
  Buffer<int8_t> q(x.size(), setting.place);
  Buffer<float> scale(kRows, setting.place);
  const Launcher launcher(setting.descending);
  run_watched(q, [&] {
    return cuda::launch_quantize_rows(launcher, dtype_of<T>(), in.data(), kRows, cols, q.data(), scale.data());
  });
  CHECK_SAME(q.values(), expected, name(cols));
  CHECK_SAME(scale.values(), expected_scale, name(cols));

  std::vector<T> fake(x.size());
  require(fake_quantize_rows(dtype_of<T>(), x.data(), kRows, cols, fake.data(), serial_executor()));
  Buffer<T> out(x.size(), setting.place);
  run_watched(out, [&] {
    return cuda::launch_fake_quantize_rows(launcher, dtype_of<T>(), in.data(), kRows, cols, out.data());
  });
  CHECK_SAME(out.values(), fake, name(cols));
  require(cuda::launch_fake_quantize_rows(launcher, dtype_of<T>(), in.data(), kRows, cols, in.data()));
  CHECK_SAME(in.values(), fake, name(cols) + ", in place");
}

// Equal, or within `tolerance` of what was added up.
template <class T>
void check_close(const std::vector<T>& got, const std::vector<T>& expected, double tolerance, int64_t cols) {
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = static_cast<double>(reference::load(&got[i]));
    const double b = static_cast<double>(reference::load(&expected[i]));
    const bool close = same(got[i], expected[i]) || std::fabs(a - b) <= tolerance * (1.0 + std::fabs(b));
    CHECK(close, "%s at %zu: %g, expected %g", name(cols).c_str(), i, a, b);
  }
}

template <class T>
void test_binarize(int64_t cols, const Setting& setting) {
  const std::vector<T> x = awkward_rows<T>(cols);
  std::vector<T> expected(x.size());
  std::vector<float> expected_mean(kRows);
  require(
      binarize_rows(dtype_of<T>(), x.data(), kRows, cols, expected.data(), expected_mean.data(), serial_executor()));
  Buffer<T> in(x, setting.place);
  Buffer<T> signs(x.size(), setting.place);
  Buffer<float> mean(kRows, setting.place);
  run_watched(signs, [&] {
    return cuda::launch_binarize_rows(Launcher(setting.descending), dtype_of<T>(), in.data(), kRows, cols, signs.data(),
                                      mean.data());
  });
  CHECK_SAME(signs.values(), expected, name(cols));
  check_close(mean.values(), expected_mean, 2e-6, cols);
}

// Values on both sides of the clipping at 1, and on it.
template <class T>
std::vector<T> around_one(int64_t cols) {
  std::vector<float> values = normals(static_cast<size_t>(kRows * cols), 2.0F);
  const float special[] = {0.0F, -0.0F, 1.0F, -1.0F, 1.01F, -1.01F};
  for (size_t i = 0; i < values.size(); i += 4) values[i] = special[i / 4 % 6];
  return narrowed<T>(values);
}

template <class T>
void test_gradients(int64_t cols, const Setting& setting) {
  const std::vector<T> x = around_one<T>(cols);
  const std::vector<T> grad = narrowed<T>(normals(x.size()));
  const std::vector<float> of_mean = normals(kRows);
  std::vector<T> expected(x.size());
  Buffer<T> in(x, setting.place);
  Buffer<T> of_grad(grad, setting.place);
  Buffer<float> grad_mean(of_mean, setting.place);
  Buffer<T> out(x.size(), setting.place);
  const Launcher launcher(setting.descending);
  const DType dtype = dtype_of<T>();
  for (bool has_grad : {true, false}) {
    for (bool has_mean : {true, false}) {
      require(binarize_rows_backward(dtype, has_grad ? grad.data() : nullptr, has_mean ? of_mean.data() : nullptr,
                                     x.data(), kRows, cols, expected.data(), serial_executor()));
      run_watched(out, [&] {
        return cuda::launch_binarize_rows_backward(launcher, dtype, has_grad ? of_grad.data() : nullptr,
                                                   has_mean ? grad_mean.data() : nullptr, in.data(), kRows, cols,
                                                   out.data());
      });
      CHECK_SAME(out.values(), expected, name(cols));
    }
  }
  require(scaled_signs_backward(dtype, grad.data(), x.data(), kRows, cols, expected.data(), serial_executor()));
  const double tolerance = step_of<T>(2e-6);
  const auto backward = [&](T* result) {
    return cuda::launch_scaled_signs_backward(launcher, dtype, of_grad.data(), in.data(), kRows, cols, result);
  };
  run_watched(out, [&] { return backward(out.data()); });
  check_close(out.values(), expected, tolerance, cols);
  const std::vector<T> first = out.values();
  require(backward(of_grad.data()));
  CHECK_SAME(of_grad.values(), first, name(cols) + ", in place");
}

void test_refusals() {
  const Launcher launcher(false);
  float y[4];
  const DType dtype = DType::kFloat32;
  refuses("x:", cuda::launch_fake_quantize_rows(launcher, dtype, nullptr, 1, 4, y));
  refuses("x:", cuda::launch_fake_quantize_rows(launcher, dtype, y, -1, 4, y));
  refuses("mean", cuda::launch_binarize_rows(launcher, dtype, y, 1, 4, y, nullptr));
  refuses("grad_x", cuda::launch_binarize_rows_backward(launcher, dtype, y, nullptr, y, 1, 4, nullptr));
  refuses("grad_y", cuda::launch_scaled_signs_backward(launcher, dtype, nullptr, y, 1, 4, y));
}

void run_all() {
  test_refusals();
  for (const Setting& setting : kSettings) {
    for (int64_t cols : {0, 1, 7, 64, 1000, 1500, 2048}) {
      for_each_dtype([&](auto element) {
        using T = decltype(element);
        test_quantize<T>(cols, setting);
        test_binarize<T>(cols, setting);
        test_gradients<T>(cols, setting);
      });
    }
  }
}

}  // namespace
}  // namespace kdq::test

int main() { return kdq::test::run_tests(kdq::test::run_all); }
