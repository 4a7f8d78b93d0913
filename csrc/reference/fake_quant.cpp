// The specification of fake-quant, one element at a time, exactly as include/kdq/fake_quant.h writes it.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "core/fake_quant_kernels.h"
#include "reference/scalar.h"

namespace kdq {
namespace {

using reference::load;
using reference::store;

struct Grid {
  float scale;
  float inverse;
  float zero_point;
  float quant_min;
  float quant_max;
};

template <GridForm kForm>
Grid at(const RunGrid& grid, int64_t i) {
  const int64_t c = kForm == kEach ? i : 0;
  return {grid.scale[c], grid.inverse[c], grid.zero_point[c], grid.quant_min, grid.quant_max};
}

// The rounded integer before clamping; NaN for NaN.
float unclamped(float x, const Grid& g) { return std::nearbyint(x * g.inverse) + g.zero_point; }

float clamp(float q, const Grid& g) { return std::isnan(q) ? q : std::min(std::max(q, g.quant_min), g.quant_max); }

float fake(float q, const Grid& g) { return (q - g.zero_point) * g.scale; }

struct Loops {
  template <class T, GridForm kForm, bool>
  static void forward(const void* x, void* y, int64_t n, const RunGrid& grid, int64_t rows, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < n; ++i) {
        const Grid g = at<kForm>(grid, i);
        const float value = load(static_cast<const T*>(x) + row * stride + i);
        store(static_cast<T*>(y) + row * stride + i, fake(clamp(unclamped(value, g), g), g));
      }
    }
  }

  template <class T, GridForm kForm, bool>
  static void backward(const void* grad_y, const void* x, void* grad_x, int64_t n, const RunGrid& grid,
                       float* scale_sum, float* zero_point_sum) {
    if (kForm == kUniform) *scale_sum = *zero_point_sum = 0.0F;
    for (int64_t i = 0; i < n; ++i) {
      const Grid g = at<kForm>(grid, i);
      const float value = load(static_cast<const T*>(x) + i);
      const float dy = load(static_cast<const T*>(grad_y) + i);
      const float before = unclamped(value, g);
      const float q = clamp(before, g);
      const bool inside = before == q;
      if (grad_x != nullptr) store(static_cast<T*>(grad_x) + i, inside ? dy : 0.0F);
      const int64_t c = kForm == kEach ? i : 0;
      scale_sum[c] += dy * (inside ? (fake(q, g) - value) * g.inverse : q - g.zero_point);
      zero_point_sum[c] += inside ? 0.0F : dy * -g.scale;
    }
  }

  template <class T, class Q, GridForm kForm>
  static void quantize(const void* x, void* q, int64_t n, const RunGrid& grid) {
    for (int64_t i = 0; i < n; ++i) {
      const Grid g = at<kForm>(grid, i);
      const float value = clamp(unclamped(load(static_cast<const T*>(x) + i), g), g);
      static_cast<Q*>(q)[i] = static_cast<Q>(std::isnan(value) ? g.zero_point : value);
    }
  }

  template <class Q, GridForm kForm>
  static void dequantize(const void* q, float* y, int64_t n, const RunGrid& grid) {
    for (int64_t i = 0; i < n; ++i) {
      const Grid g = at<kForm>(grid, i);
      y[i] = fake(static_cast<float>(static_cast<const Q*>(q)[i]), g);
    }
  }

  template <class T>
  static float quantize_row(const void* x, int64_t n, int8_t* q) {
    const T* row = static_cast<const T*>(x);
    uint32_t largest = 0;  // bit patterns without the sign order as the magnitudes do, and NaN > inf > finite
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, reference::bits_of(std::fabs(load(row + i))));
    float scale = reference::float_of(largest) / 127.0F;
    if (scale < FLT_MIN) scale = FLT_MIN;
    const float inverse = 1.0F / scale;
    for (int64_t i = 0; i < n; ++i) {
      const float rounded = std::nearbyint(load(row + i) * inverse);
      q[i] = std::isfinite(scale) ? static_cast<int8_t>(std::min(std::max(rounded, -127.0F), 127.0F)) : int8_t{0};
    }
    return scale;
  }

  template <class T>
  static void fake_quantize_row(const void* x, int64_t n, void* y) {
    std::vector<int8_t> q(static_cast<size_t>(n));
    const float scale = quantize_row<T>(x, n, q.data());
    for (int64_t i = 0; i < n; ++i) {
      const float value = static_cast<float>(q[static_cast<size_t>(i)]) * scale;
      store(static_cast<T*>(y) + i, std::isfinite(scale) ? value : std::nanf(""));
    }
  }

  template <class T>
  static float binarize(const void* x, int64_t n, void* signs) {
    float sum = 0.0F;
    for (int64_t i = 0; i < n; ++i) {
      const float value = load(static_cast<const T*>(x) + i);
      store(static_cast<T*>(signs) + i, value < 0.0F ? -1.0F : 1.0F);
      sum += std::fabs(value);
    }
    return sum;
  }

  template <class T>
  static void binarize_sums(const void* grad, const void* x, int64_t n, float* magnitude, float* product) {
    *magnitude = *product = 0.0F;
    for (int64_t i = 0; i < n; ++i) {
      const float value = load(static_cast<const T*>(x) + i);
      const float dy = load(static_cast<const T*>(grad) + i);
      *magnitude += std::fabs(value);
      *product += value < 0.0F ? -dy : dy;
    }
  }

  template <class T>
  static void binarize_backward(const void* grad, float scale, float mean_step, const void* x, int64_t n,
                                void* grad_x) {
    for (int64_t i = 0; i < n; ++i) {
      const float value = load(static_cast<const T*>(x) + i);
      const float dy = grad == nullptr ? 0.0F : load(static_cast<const T*>(grad) + i) * scale;
      const float straight = std::fabs(value) <= 1.0F ? dy : 0.0F;
      const float through_mean = value > 0.0F ? mean_step : value < 0.0F ? -mean_step : 0.0F;
      store(static_cast<T*>(grad_x) + i, straight + through_mean);
    }
  }
};

}  // namespace

const FakeQuantKernels kFakeQuantReference = make_fake_quant_kernels<Loops>();

}  // namespace kdq
