// Binarization for training on a GPU: signs and the mean magnitude of each row, and their gradients. A warp or a block
// a row. The 16 bytes that a thread reads at once are added up in float32, these sums in float64, in an order that
// depends on the shape alone. The former overflow, as the CPU's longer ones do, where magnitudes reach some 1e38.
#pragma once

#include "cuda/quantize_rows.h"

namespace kdq::cuda {

KDQ_DEVICE float magnitude_of(float value) { return float_of(bits_of(value) & 0x7FFFFFFFU); }

template <class T, int kTeam>
struct BinarizeRows {
  using Team = RowTeam<T, kTeam>;
  static constexpr int kThreads = Team::kThreads;
  static constexpr int kRows = Team::kRows;
  struct Shared {
    double sums[kThreads / kWarp];
  };

  const T* x;
  T* signs;
  float* mean;
  int64_t rows;
  int64_t cols;
  bool wide;  // rows of x and of signs are multiples of 16

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t row = Team::row(thread);
    if (row >= rows) return;
    double sum = 0.0;
    for (int64_t i = Team::first(thread); i < cols; i += Team::kStep) {
      float values[kChunk<T>];
      load_chunk(thread, x + row * cols + i, wide, cols - i, values);
      float of_chunk = 0.0F;
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        of_chunk += magnitude_of(values[e]);
        values[e] = values[e] < 0.0F ? -1.0F : 1.0F;
      }
      sum += static_cast<double>(of_chunk);
      store_floats(thread, signs + row * cols + i, wide, cols - i, values);
    }
    sum = Team::reduce(thread, shared.sums, sum, Sum());
    const double n = cols == 0 ? 1.0 : static_cast<double>(cols);
    if (Team::first(thread) == 0) thread.store(mean + row, static_cast<float>(sum / n));
  }
};

// kScaled: the gradient of signs * mean, for which a row is read twice; else that of signs and of mean.
template <class T, int kTeam, bool kScaled>
struct BinarizeRowsBackward {
  using Team = RowTeam<T, kTeam>;
  static constexpr int kThreads = Team::kThreads;
  static constexpr int kRows = Team::kRows;
  struct Shared {
    double magnitudes[kThreads / kWarp];
    double products[kThreads / kWarp];
  };

  const T* grad;           // of the signs, or of their product with mean; or nullptr: 0
  const float* grad_mean;  // or nullptr: 0
  const T* x;
  T* grad_x;
  int64_t rows;
  int64_t cols;
  bool wide;  // rows of all are multiples of 16

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t row = Team::row(thread);
    if (row >= rows) return;
    float scale = 1.0F;
    float mean_step = 0.0F;
    if constexpr (kScaled) {
      add_up(thread, row, shared, &scale, &mean_step);
    } else if (grad_mean != nullptr) {
      mean_step = thread.load(grad_mean + row) / static_cast<float>(cols);
    }
    for (int64_t i = Team::first(thread); i < cols; i += Team::kStep) {
      float values[kChunk<T>];
      float grads[kChunk<T>] = {};
      load_chunk(thread, x + row * cols + i, wide, cols - i, values);
      if (grad != nullptr) load_chunk(thread, grad + row * cols + i, wide, cols - i, grads);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        const float straight = magnitude_of(values[e]) <= 1.0F ? grads[e] * scale : 0.0F;
        const float through_mean = values[e] > 0.0F ? mean_step : values[e] < 0.0F ? -mean_step : 0.0F;
        grads[e] = straight + through_mean;
      }
      store_floats(thread, grad_x + row * cols + i, wide, cols - i, grads);
    }
  }

 private:
  // The means over a row of |x| and of grad * sign(x).
  template <class Thread>
  KDQ_DEVICE void add_up(Thread& thread, int64_t row, Shared& shared, float* magnitude, float* product) const {
    double magnitudes = 0.0;
    double products = 0.0;
    for (int64_t i = Team::first(thread); i < cols; i += Team::kStep) {
      float values[kChunk<T>];
      float grads[kChunk<T>];
      load_chunk(thread, x + row * cols + i, wide, cols - i, values);
      load_chunk(thread, grad + row * cols + i, wide, cols - i, grads);
      float chunk_magnitude = 0.0F;
      float chunk_product = 0.0F;
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        chunk_magnitude += magnitude_of(values[e]);
        chunk_product += values[e] < 0.0F ? -grads[e] : grads[e];
      }
      magnitudes += static_cast<double>(chunk_magnitude);
      products += static_cast<double>(chunk_product);
    }
    const double n = cols == 0 ? 1.0 : static_cast<double>(cols);
    *magnitude = static_cast<float>(Team::reduce(thread, shared.magnitudes, magnitudes, Sum()) / n);
    *product = static_cast<float>(Team::reduce(thread, shared.products, products, Sum()) / n);
  }
};

template <class Launcher>
Status launch_binarize_rows(const Launcher& launcher, DType dtype, const void* x, int64_t rows, int64_t cols,
                            void* signs, float* mean) {
  Status status = check_rows(x, rows, cols, "signs", signs);
  if (status.ok()) status = check_pointer("mean", mean, rows);
  if (!status.ok()) return status;
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return with_row_team(cols, [&](auto team) {
      const bool wide = rows_are_wide<T>(x, signs, sizeof(T), cols);
      const BinarizeRows<T, team.value> kernel = {
          static_cast<const T*>(x), static_cast<T*>(signs), mean, rows, cols, wide};
      return launcher.run(kernel, ceil_div(rows, kernel.kRows));
    });
  });
}

template <bool kScaled, class Launcher>
Status launch_binarize_backward(const Launcher& launcher, DType dtype, const void* grad, const float* grad_mean,
                                const void* x, int64_t rows, int64_t cols, void* grad_x) {
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return with_row_team(cols, [&](auto team) {
      const bool wide = rows_are_wide<T>(x, grad_x, sizeof(T), cols) && is_aligned(grad, 16);
      const BinarizeRowsBackward<T, team.value, kScaled> kernel = {
          static_cast<const T*>(grad), grad_mean, static_cast<const T*>(x), static_cast<T*>(grad_x), rows, cols, wide};
      return launcher.run(kernel, ceil_div(rows, kernel.kRows));
    });
  });
}

template <class Launcher>
Status launch_binarize_rows_backward(const Launcher& launcher, DType dtype, const void* grad_signs,
                                     const float* grad_mean, const void* x, int64_t rows, int64_t cols, void* grad_x) {
  const Status status = check_rows(x, rows, cols, "grad_x", grad_x);
  if (!status.ok()) return status;
  return launch_binarize_backward<false>(launcher, dtype, grad_signs, grad_mean, x, rows, cols, grad_x);
}

template <class Launcher>
Status launch_scaled_signs_backward(const Launcher& launcher, DType dtype, const void* grad_y, const void* x,
                                    int64_t rows, int64_t cols, void* grad_x) {
  Status status = check_rows(x, rows, cols, "grad_x", grad_x);
  if (status.ok()) status = check_pointer("grad_y", grad_y, rows * cols);
  if (!status.ok()) return status;
  return launch_binarize_backward<true>(launcher, dtype, grad_y, nullptr, x, rows, cols, grad_x);
}

}  // namespace kdq::cuda
