// The checked, expanded form of a fake-quant call's grid and layout: which runs of contiguous elements to process, and
// with which scales.
#pragma once

#include <algorithm>
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

// Pieces of runs: `piece` elements or what is left of the run. body(row, offset, n, index of the piece), which does the
// work of `height` such pieces.
template <class Body>
void for_each_piece(const RunLayout& layout, int64_t piece, int64_t height, const ParallelFor& parallel_for,
                    Body&& body) {
  constexpr int64_t kElementsWorthAThread = 16384;
  if (layout.row_length == 0) return;
  const int64_t pieces = (layout.row_length + piece - 1) / piece;
  const int64_t work = std::min(layout.row_length, piece) * height;
  const int64_t grain = std::max<int64_t>(1, kElementsWorthAThread / work);
  parallel_range(parallel_for, layout.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    int64_t row = begin / pieces;
    int64_t offset = (begin % pieces) * piece;
    for (int64_t i = begin; i < end; ++i) {
      body(row, offset, std::min(piece, layout.row_length - offset), i);
      offset += piece;
      if (offset >= layout.row_length) {
        offset = 0;
        ++row;
      }
    }
  });
}

// Elements of a piece of a run with a scale an element: few, so that its part of the grid stays in the first-level
// cache. Many where the result goes past the caches: the grid then comes from the second level, but each jump to
// another run leaves the memory idle for a while.
constexpr int64_t kEachPiece = 2048;
constexpr int64_t kStreamedPiece = 16384;

// All elements: body(row, offset, n, rows) for pieces of n elements in each of `rows` runs from `row` on, which share
// their grid: one run, or several with a scale an element, in pieces of each_piece.
template <class Body>
void for_each_tile(const RunLayout& layout, int64_t each_piece, const ParallelFor& parallel_for, Body&& body) {
  constexpr int64_t kPiece = 16384;  // makes the call free, and is few enough to share a run among threads
  constexpr int64_t kEachRows = 16;
  if (layout.form == kUniform) {
    for_each_piece(layout, kPiece, 1, parallel_for,
                   [&](int64_t row, int64_t offset, int64_t n, int64_t) { body(row, offset, n, int64_t{1}); });
    return;
  }
  RunLayout tiles = layout;
  tiles.rows = (layout.rows + kEachRows - 1) / kEachRows;
  for_each_piece(tiles, each_piece, kEachRows, parallel_for, [&](int64_t tile, int64_t offset, int64_t n, int64_t) {
    const int64_t row = tile * kEachRows;
    body(row, offset, n, std::min(layout.rows - row, kEachRows));
  });
}

// The same, one run at a time: body(row, offset, n).
template <class Body>
void for_each_run(const RunLayout& layout, const ParallelFor& parallel_for, Body&& body) {
  for_each_tile(layout, kEachPiece, parallel_for, [&](int64_t first, int64_t offset, int64_t n, int64_t rows) {
    for (int64_t row = first; row < first + rows; ++row) body(row, offset, n);
  });
}

// Whether a result of this layout should go past the caches: it is too large to be found there by whoever reads it, and
// the lines need not be read before they are written. Not in place, where they have been read anyway.
bool worth_streaming(const RunLayout& layout, const void* in, const void* out, size_t element_size);

Status fake_quant_kernels(const FakeQuantKernels** kernels);

// Element `index` of a buffer whose elements have `size` bytes.
inline const char* at(const void* base, int64_t index, size_t size) {
  return static_cast<const char*>(base) + static_cast<size_t>(index) * size;
}
inline char* at(void* base, int64_t index, size_t size) {
  return static_cast<char*>(base) + static_cast<size_t>(index) * size;
}

}  // namespace kdq
