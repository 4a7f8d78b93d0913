// The members of the fake-quant family whose scale comes from the row itself: dynamic quantization and binarization.
#include <algorithm>

#include "core/fake_quant_grid.h"
#include "core/parallel_range.h"
#include "kdq/fake_quant.h"

namespace kdq {
namespace {

// Elements that a thread gets at least.
constexpr int64_t kPiece = 16384;

// The start of everything here: chooses kernels, checks the sizes and the two buffers.
Status begin(int64_t rows, int64_t cols, const void* x, const void* y, const FakeQuantKernels** kernels) {
  if (rows < 0 || cols < 0) return Status::invalid("x: expected sizes of at least 0");
  if (rows * cols > 0 && (x == nullptr || y == nullptr)) {
    return Status::invalid("x and its result: expected pointers, got null");
  }
  return fake_quant_kernels(kernels);
}

// body(r, first element of the row) for every row.
template <class Body>
void for_each_row(int64_t rows, int64_t cols, const ParallelFor& parallel_for, Body&& body) {
  const int64_t grain = cols < kPiece ? kPiece / (cols + 1) + 1 : 1;
  parallel_range(parallel_for, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) body(r, r * cols);
  });
}

}  // namespace

Status quantize_rows(DType dtype, const void* x, int64_t rows, int64_t cols, int8_t* q, float* scale,
                     const ParallelFor& parallel_for) {
  const FakeQuantKernels* kernels = nullptr;
  const Status status = begin(rows, cols, x, q, &kernels);
  if (!status.ok()) return status;
  if (rows > 0 && scale == nullptr) return Status::invalid("scale: expected a pointer, got null");
  const auto quantize_row = kernels->quantize_row[static_cast<int>(dtype)];
  for_each_row(rows, cols, parallel_for, [&](int64_t r, int64_t first) {
    scale[r] = quantize_row(at(x, first, dtype_size(dtype)), cols, q + first);
  });
  return status;
}

Status fake_quantize_rows(DType dtype, const void* x, int64_t rows, int64_t cols, void* y,
                          const ParallelFor& parallel_for) {
  const FakeQuantKernels* kernels = nullptr;
  const Status status = begin(rows, cols, x, y, &kernels);
  if (!status.ok()) return status;
  const auto row = kernels->fake_quantize_row[static_cast<int>(dtype)];
  for_each_row(rows, cols, parallel_for, [&](int64_t, int64_t first) {
    row(at(x, first, dtype_size(dtype)), cols, at(y, first, dtype_size(dtype)));
  });
  return status;
}

Status binarize_rows(DType dtype, const void* x, int64_t rows, int64_t cols, void* signs, float* mean,
                     const ParallelFor& parallel_for) {
  const FakeQuantKernels* kernels = nullptr;
  const Status status = begin(rows, cols, x, signs, &kernels);
  if (!status.ok()) return status;
  if (rows > 0 && mean == nullptr) return Status::invalid("mean: expected a pointer, got null");
  const auto binarize = kernels->binarize[static_cast<int>(dtype)];
  const size_t element = dtype_size(dtype);
  for_each_row(rows, cols, parallel_for, [&](int64_t r, int64_t first) {
    double sum = 0.0;
    for (int64_t i = 0; i < cols; i += kBackwardBlock) {
      const int64_t n = std::min(kBackwardBlock, cols - i);
      sum += static_cast<double>(binarize(at(x, first + i, element), n, at(signs, first + i, element)));
    }
    mean[r] = cols == 0 ? 0.0F : static_cast<float>(sum / static_cast<double>(cols));
  });
  return status;
}

Status binarize_rows_backward(DType dtype, const void* grad_signs, const float* grad_mean, const void* x, int64_t rows,
                              int64_t cols, void* grad_x, const ParallelFor& parallel_for) {
  const FakeQuantKernels* kernels = nullptr;
  const Status status = begin(rows, cols, x, grad_x, &kernels);
  if (!status.ok()) return status;
  const auto backward = kernels->binarize_backward[static_cast<int>(dtype)];
  const size_t element = dtype_size(dtype);
  for_each_row(rows, cols, parallel_for, [&](int64_t r, int64_t first) {
    const float mean_step = grad_mean == nullptr ? 0.0F : grad_mean[r] / static_cast<float>(cols);
    const void* grad = grad_signs == nullptr ? nullptr : at(grad_signs, first, element);
    backward(grad, 1.0F, mean_step, at(x, first, element), cols, at(grad_x, first, element));
  });
  return status;
}

Status scaled_signs_backward(DType dtype, const void* grad_y, const void* x, int64_t rows, int64_t cols, void* grad_x,
                             const ParallelFor& parallel_for) {
  const FakeQuantKernels* kernels = nullptr;
  Status status = begin(rows, cols, x, grad_x, &kernels);
  if (status.ok() && rows * cols > 0 && grad_y == nullptr)
    status = Status::invalid("grad_y: expected a pointer, got null");
  if (!status.ok()) return status;
  const auto sums = kernels->binarize_sums[static_cast<int>(dtype)];
  const auto backward = kernels->binarize_backward[static_cast<int>(dtype)];
  const size_t element = dtype_size(dtype);
  for_each_row(rows, cols, parallel_for, [&](int64_t, int64_t first) {
    double magnitude = 0.0;
    double product = 0.0;
    for (int64_t i = 0; i < cols; i += kBackwardBlock) {
      float block[2] = {};
      sums(at(grad_y, first + i, element), at(x, first + i, element), std::min(kBackwardBlock, cols - i), &block[0],
           &block[1]);
      magnitude += static_cast<double>(block[0]);
      product += static_cast<double>(block[1]);
    }
    const double n = static_cast<double>(std::max<int64_t>(cols, 1));
    backward(at(grad_y, first, element), static_cast<float>(magnitude / n), static_cast<float>(product / n),
             at(x, first, element), cols, at(grad_x, first, element));
  });
  return status;
}

}  // namespace kdq
