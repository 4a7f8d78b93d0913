// How a product is cut up: shared by the exact matmul and the linear layers, which differ only in how a row of
// activations is prepared and how a row of sums is stored.
//
//   for each chunk of rows that fits the scratch:                  (bounds memory: kScratchBytes)
//     prepare all its rows                                         parallel over rows
//     for each block of rows x group of panels:                    parallel over these, fixed by the shape
//       for each tile of the block:  tile, then store it           the panel stays in L1 or L2, the block in L2
#pragma once

#include <algorithm>

#include "core/blocking.h"
#include "core/packed_weight.h"
#include "core/parallel_range.h"
#include "core/scratch.h"

namespace kdq {

// Half of a small L2 (512 KiB): what a block of prepared rows may take while panels stream past it.
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kScratchBytes = 4 * 1024 * 1024;
// Multiply-accumulates below which waking another thread costs more than it saves (some 10 us of work).
constexpr int64_t kProductsWorthAThread = 1 << 19;
constexpr int kMaxTile = 8 * 64;  // sums of the largest register tile

// Prepared rows lie an odd number of cache lines apart: with a power of two, rows of one tile would fall on the same
// few sets of the L1 cache.
inline int64_t padded_stride(int64_t row_bytes) { return ((row_bytes + 63) / 64 | 1) * 64; }

struct ProductShape {
  int64_t m;
  int64_t row_bytes;  // of a prepared row
  int64_t mr;
  int64_t nr;
  int panels_at_once;  // where all m rows fit one tile
};

// prepare(row, buffer) -> scale of the row
// tile(rows' buffer, stride in bytes, number of rows, panels, acc)
// store(acc of a tile, its first row, its first channel, the scales of its rows, all of its TileOutput but y)
template <class Acc, class Prepare, class Tile, class Store>
Status run_product(const ProductShape& shape, const PackedWeight& weight, const ParallelFor& parallel_for,
                   Prepare&& prepare, Tile&& tile, Store&& store) {
  const int64_t stride = padded_stride(shape.row_bytes);
  const int64_t rows_in_scratch = kScratchBytes / stride / shape.mr * shape.mr;
  const int64_t chunk_rows = std::min(shape.m, std::max(shape.mr, rows_in_scratch));
  const int64_t block_rows = even_block(chunk_rows, std::max(shape.mr, kBlockBytes / stride), shape.mr);
  const int64_t scales_bytes = padded_stride(chunk_rows * 4);
  Scratch scratch(static_cast<size_t>(scales_bytes + chunk_rows * stride));
  if (scratch.data() == nullptr) return Status::internal("out of memory for the rows of x");
  float* scales = reinterpret_cast<float*>(scratch.data());
  char* rows = scratch.data() + scales_bytes;

  for (int64_t first = 0; first < shape.m; first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, shape.m - first);
    parallel_range(parallel_for, count, kProductsWorthAThread / 8 / stride + 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) scales[r] = prepare(first + r, rows + r * stride);
    });
    const int64_t blocks = (count + block_rows - 1) / block_rows;
    const int at_once = shape.m <= shape.mr ? shape.panels_at_once : 1;
    const int64_t groups = (weight.panels + at_once - 1) / at_once;
    const int64_t products = std::min(count, block_rows) * at_once * shape.nr * std::max<int64_t>(weight.k, 1);
    const int64_t grain = kProductsWorthAThread / products + 1;
    parallel_range(parallel_for, blocks * groups, grain, [&](int64_t begin, int64_t end) {
      alignas(64) Acc acc[kMaxTile];
      const auto run = [&](int64_t block, int64_t panel, int panels) {
        const PanelGroup group = {weight.panel + panel * weight.panel_bytes, weight.panel_bytes, panels};
        const int64_t last_row = std::min(count, (block + 1) * block_rows);
        const int64_t channel = panel * shape.nr;
        const int width = panels * static_cast<int>(shape.nr);
        const int channels = static_cast<int>(std::min<int64_t>(width, weight.n - channel));
        for (int64_t r = block * block_rows; r < last_row; r += shape.mr) {
          const int tile_rows = static_cast<int>(std::min(shape.mr, last_row - r));
          tile(rows + r * stride, stride, tile_rows, group, acc);
          store(acc, first + r, channel, scales + r, TileOutput{tile_rows, width, channels, nullptr, weight.n});
        }
      };
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i % groups * at_once;
        if (panel + at_once <= weight.panels) {
          run(i / groups, panel, at_once);
        } else {
          for (int64_t last = panel; last < weight.panels; ++last) run(i / groups, last, 1);
        }
      }
    });
  }
  return {};
}

}  // namespace kdq
