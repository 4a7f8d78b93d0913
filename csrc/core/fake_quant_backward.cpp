// Gradients of fake-quant. One pass over x and grad_y writes grad_x and partial sums for scale and zero point; the
// partial sums are then added in float64 in a fixed order, so that the result does not depend on who computed which.
#include <algorithm>
#include <string>

#include "core/fake_quant_grid.h"
#include "kdq/fake_quant.h"

namespace kdq {
namespace {

struct Call {
  const FakeQuantKernels* kernels;
  PreparedGrid prepared;
  DType dtype;
  const char* grad_y;
  const char* x;
  char* grad_x;  // or nullptr
  bool streamed;

  void run(int64_t row, int64_t offset, int64_t n, float* scale_sum, float* zero_point_sum) const {
    const size_t first = static_cast<size_t>(row * prepared.layout.row_length + offset) * dtype_size(dtype);
    const auto loop = kernels->backward[static_cast<int>(dtype)][prepared.layout.form][streamed];
    loop(grad_y + first, x + first, grad_x == nullptr ? nullptr : grad_x + first, n, prepared.at(row, offset),
         scale_sum, zero_point_sum);
  }
};

// A sum a piece of a run; channel c owns the pieces of the rows r with r % channels == c.
void backward_uniform(const Call& call, const ParallelFor& parallel_for, std::vector<double>* scale_total,
                      std::vector<double>* zero_point_total) {
  const RunLayout& layout = call.prepared.layout;
  const int64_t pieces = (layout.row_length + kBackwardBlock - 1) / kBackwardBlock;
  std::vector<float> scale_sum(static_cast<size_t>(layout.rows * pieces));
  std::vector<float> zero_point_sum(scale_sum.size());
  for_each_piece(layout, kBackwardBlock, 1, parallel_for, [&](int64_t row, int64_t offset, int64_t n, int64_t index) {
    call.run(row, offset, n, &scale_sum[static_cast<size_t>(index)], &zero_point_sum[static_cast<size_t>(index)]);
  });
  for (int64_t row = 0; row < layout.rows; ++row) {
    const size_t c = static_cast<size_t>(row % layout.channels);
    for (int64_t i = row * pieces; i < (row + 1) * pieces; ++i) {
      (*scale_total)[c] += scale_sum[static_cast<size_t>(i)];
      (*zero_point_total)[c] += zero_point_sum[static_cast<size_t>(i)];
    }
  }
}

// Sums run down the rows: blocks of kRows rows each have a float32 sum an element, and blocks are added in float64.
void backward_each(const Call& call, const ParallelFor& parallel_for, std::vector<double>* scale_total,
                   std::vector<double>* zero_point_total) {
  constexpr int64_t kRows = 256;
  constexpr int64_t kEachPiece = 1024;  // its part of the grid and of the sums stays in the first-level cache
  const RunLayout& layout = call.prepared.layout;
  const int64_t width = layout.row_length;
  const RunLayout blocks = {kEach, (layout.rows + kRows - 1) / kRows, width, layout.channels, layout.inner};
  std::vector<float> scale_sum(static_cast<size_t>(blocks.rows * width), 0.0F);
  std::vector<float> zero_point_sum(scale_sum.size(), 0.0F);
  for_each_piece(blocks, kEachPiece, kRows, parallel_for, [&](int64_t block, int64_t offset, int64_t n, int64_t) {
    const size_t first = static_cast<size_t>(block * width + offset);
    const int64_t last_row = std::min(layout.rows, (block + 1) * kRows);
    for (int64_t row = block * kRows; row < last_row; ++row) {
      call.run(row, offset, n, &scale_sum[first], &zero_point_sum[first]);
    }
  });
  for (int64_t block = 0; block < blocks.rows; ++block) {
    for (int64_t i = 0; i < width; ++i) {
      const size_t c = static_cast<size_t>(i / layout.inner);
      (*scale_total)[c] += scale_sum[static_cast<size_t>(block * width + i)];
      (*zero_point_total)[c] += zero_point_sum[static_cast<size_t>(block * width + i)];
    }
  }
}

}  // namespace

Status fake_quantize_backward(DType dtype, const void* grad_y, const void* x, void* grad_x, float* grad_scale,
                              float* grad_zero_point, const QuantShape& shape, const QuantGrid& grid,
                              const ParallelFor& parallel_for) {
  Call call;
  Status status = fake_quant_kernels(&call.kernels);
  if (status.ok()) status = prepare_grid(shape, grid, &call.prepared);
  if (!status.ok()) return status;
  const RunLayout& layout = call.prepared.layout;
  if (layout.rows * layout.row_length > 0 && (x == nullptr || grad_y == nullptr)) {
    return Status::invalid("x, grad_y: expected pointers, got null");
  }
  call.dtype = dtype;
  call.grad_y = static_cast<const char*>(grad_y);
  call.x = static_cast<const char*>(x);
  call.grad_x = static_cast<char*>(grad_x);
  call.streamed = grad_x != nullptr && worth_streaming(layout, grad_y, grad_x, dtype_size(dtype));

  std::vector<double> scale_total(static_cast<size_t>(shape.channels), 0.0);
  std::vector<double> zero_point_total(scale_total.size(), 0.0);
  const auto backward = layout.form == kUniform ? backward_uniform : backward_each;
  if (layout.row_length > 0) backward(call, parallel_for, &scale_total, &zero_point_total);
  for (size_t c = 0; c < scale_total.size(); ++c) {
    if (grad_scale != nullptr) grad_scale[c] = static_cast<float>(scale_total[c]);
    if (grad_zero_point != nullptr) grad_zero_point[c] = static_cast<float>(zero_point_total[c]);
  }
  return status;
}

}  // namespace kdq
