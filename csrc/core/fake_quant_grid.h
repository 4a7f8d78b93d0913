// The checked, expanded form of a fake-quant call's grid and layout: which runs of contiguous elements to process, and
// with which scales.
#pragma once

#include <vector>

#include "core/fake_quant_kernels.h"
#include "core/parallel_range.h"
#include "kdq/fake_quant.h"

namespace kdq {

// A dense buffer as `rows` runs of `row_length` elements. kUniform: run r uses scale r % channels. kEach: every run is
// one pass over all channels, element i of it using scale i.
struct RunLayout {
  GridForm form = kUniform;
  int64_t rows = 0;
  int64_t row_length = 0;
  int64_t channels = 1;  // entries of the grid's arrays
  int64_t inner = 1;     // how often each scale was repeated to make those entries (kEach with a small inner size)
};

struct PreparedGrid {
  RunLayout layout;
  std::vector<float> scale;
  std::vector<float> inverse;
  std::vector<float> zero_point;
  float quant_min = 0;
  float quant_max = 0;

  // The grid of `row`, from element `offset` of it on.
  RunGrid at(int64_t row, int64_t offset) const {
    const int64_t c = layout.form == kEach ? offset : row % layout.channels;
    return {scale.data() + c, inverse.data() + c, zero_point.data() + c, quant_min, quant_max};
  }
};

Status prepare_grid(const QuantShape& shape, const QuantGrid& grid, PreparedGrid* prepared);

// Pieces of runs: `piece` elements or what is left of the run. body(row, offset, n, index of the piece).
template <class Body>
void for_each_piece(const RunLayout& layout, int64_t piece, const ParallelFor& parallel_for, Body&& body) {
  constexpr int64_t kElementsWorthAThread = 16384;
  if (layout.row_length == 0) return;
  const int64_t pieces = (layout.row_length + piece - 1) / piece;
  const int64_t piece_length = layout.row_length < piece ? layout.row_length : piece;
  const int64_t grain = piece_length < kElementsWorthAThread ? kElementsWorthAThread / piece_length : 1;
  parallel_range(parallel_for, layout.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pieces;
      const int64_t offset = (i % pieces) * piece;
      const int64_t left = layout.row_length - offset;
      body(row, offset, left < piece ? left : piece, i);
    }
  });
}

Status fake_quant_kernels(const FakeQuantKernels** kernels);

// Element `index` of a buffer whose elements have `size` bytes.
inline const char* at(const void* base, int64_t index, size_t size) {
  return static_cast<const char*>(base) + static_cast<size_t>(index) * size;
}
inline char* at(void* base, int64_t index, size_t size) {
  return static_cast<char*>(base) + static_cast<size_t>(index) * size;
}

}  // namespace kdq
