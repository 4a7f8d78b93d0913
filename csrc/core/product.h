// How a product is cut up: shared by the int8, binary and codebook families, which differ in how a row of activations
// is prepared and what a tile does.
//
//   for each block of rows x group of panels:       parallel over ranges of these, in this order
//     for each tile of the block:                   the group's panels stay in L1 or L2
//       if the range has not prepared the block:    prepare the tile's rows, into the thread's own scratch (L2)
//       multiply                                    by all of the panels, or by the first of several pieces
//     for each further piece, each tile:            multiply
//
// Each block begins with another group, so that threads work on different ones at a time. A tile is told what comes
// after it, so that a kernel bound by its arithmetic can have it brought into L2 meanwhile.
//
// There is one parallel region and no barrier. A block on the border between two threads is prepared by both: cheaper
// than waiting for each other, and as preparation is deterministic, it makes the same bits.
#pragma once

#include <algorithm>
#include <atomic>

#include "core/blocking.h"
#include "core/parallel_range.h"
#include "core/scratch.h"
#include "core/tile_output.h"
#include "kdq/status.h"

namespace kdq {

// What a block of prepared rows takes at most, give or take what evens their number (blocking.h): half of a small L2
// (512 KiB), as panels stream past it.
constexpr int64_t kBlockBytes = 256 * 1024;
// More rows than these would not help: with 96 products to each weight that is read, reading the weights takes a tenth
// of what an L3 cache gives, and smaller blocks spread evenly over threads. Likewise give or take.
constexpr int64_t kBlockRows = 96;

// Of an element; one of bits is a word.
inline int result_bytes(Result type) {
  if (type == Result::kBits) return 8;
  return type == Result::kFloat32 || type == Result::kInt32 ? 4 : 2;
}

// Of a whole buffer. Operands and results of a layer share L2 (1 MiB here) with those of the layers around it, so that
// they are taken to lie in L3 (32 MiB) long before they would fill L2 alone: the layers of a model, one after the
// other, take up to 10 % less time so, and one called again and again no longer than before.
constexpr int64_t kFarBytes = int64_t{128} << 10;
constexpr int64_t kFarResultBytes = int64_t{256} << 10;
constexpr int64_t kMemoryBytes = int64_t{8} << 20;

// Writing past the caches takes whole vectors at aligned addresses.
inline Place place_of(const void* y, int64_t rows, int64_t row_bytes) {
  const int64_t bytes = rows * row_bytes;
  const bool aligned = reinterpret_cast<uintptr_t>(y) % 64 == 0 && row_bytes % 64 == 0;
  if (bytes >= kMemoryBytes && aligned) return Place::kMemory;
  return bytes >= kFarResultBytes ? Place::kFar : Place::kNear;
}

struct ProductShape {
  int64_t m;
  int64_t row_bytes;  // of a prepared row
  int64_t mr;         // most rows of a tile
  int64_t groups;     // of panels
  int64_t row_work;   // of one row and one group, in any unit
  int64_t grain;      // how much of it makes waking another thread worth its while

  int64_t block_rows = kBlockRows;  // about the most of a block,
  int64_t block_bytes = kBlockBytes;
  int64_t panel_bytes = 0;  // of scratch for what tiles of one group share
  int64_t pieces = 1;       // of a group, each gone through by all of a block's tiles before the next
};

// Prepared rows lie an odd number of cache lines apart: with a power of two, rows of one tile would fall on the same
// few sets of the L1 cache.
inline int64_t padded_stride(int64_t row_bytes) { return ((row_bytes + 63) / 64 | 1) * 64; }

struct RowTile {
  const char* rows;  // prepared, `stride` bytes apart
  int64_t stride;
  const float* scales;
  int64_t first;  // the first one's place in the whole product
  int count;
  char* panel;    // scratch, with what the tile before left in it, if that was of the same group
  int64_t piece;  // of the group

  // What comes after the tile.
  int64_t tile_in_group;   // its number among its block's tiles of one group,
  int64_t tiles;           // which are so many,
  int64_t tile_in_block;   // and among all of its block
  int64_t next_prepared;   // the first of the rows that are prepared next, before the tile that follows; or -1
  int64_t next_group;      // whose panels follow the group's tiles; or -1
  int64_t next_block;      // the first row of the next block,
  int64_t next_block_end;  // and the one after its last: the same after the last block
};

// Of a block: few enough to stay in the caches, in blocks of one size.
inline int64_t rows_of_block(const ProductShape& shape) {
  const int64_t stride = padded_stride(shape.row_bytes);
  const int64_t most = std::clamp(shape.block_bytes / stride, shape.mr, std::max(shape.mr, shape.block_rows));
  return even_block(shape.m, most);
}

inline bool is_far(int64_t bytes) { return bytes >= kFarBytes; }

// Where prepared rows go: `stride` bytes apart, with a scale each.
struct PreparedRows {
  char* rows;
  int64_t stride;
  float* scales;
};

// prepare(first, count, PreparedRows)
// multiplier(group) -> what multiplies a RowTile by that group's panels: what tiles of a group share is done once,
// since a binary tile of K = 1024 takes but 600 cycles.
template <class Prepare, class Multiplier>
Status run_product(const ProductShape& shape, const ParallelFor& parallel_for, Prepare&& prepare,
                   Multiplier&& multiplier) {
  const int64_t stride = padded_stride(shape.row_bytes);
  const int64_t block_rows = rows_of_block(shape);
  const int64_t blocks = (shape.m + block_rows - 1) / block_rows;
  const int64_t scales_bytes = padded_stride(block_rows * 4);
  const int64_t block_work = std::max<int64_t>(1, std::min(block_rows, shape.m) * shape.row_work);
  const int64_t grain = shape.grain / block_work + 1;
  std::atomic<bool> out_of_memory{false};

  parallel_range(parallel_for, blocks * shape.groups, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(static_cast<size_t>(scales_bytes + block_rows * stride + shape.panel_bytes));
    if (scratch.data() == nullptr) {
      out_of_memory.store(true, std::memory_order_relaxed);
      return;
    }
    float* scales = reinterpret_cast<float*>(scratch.data());
    char* rows = scratch.data() + scales_bytes;
    const auto group_of = [&](int64_t i) { return (i + i / shape.groups * shape.groups / blocks) % shape.groups; };
    bool fresh = true;  // the block's rows are not prepared yet
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / shape.groups;
      const int64_t next = std::min(i + 1, end - 1);
      const bool fresh_next = next / shape.groups != block;
      const int64_t group = group_of(i);
      const int64_t count = std::min(block_rows, shape.m - block * block_rows);
      const EvenTiles tiles(count, shape.mr);
      auto multiply = multiplier(group);
      RowTile at;
      at.stride = stride;
      at.panel = rows + block_rows * stride;
      at.tiles = tiles.count;
      at.next_group = group_of(next) == group ? -1 : group_of(next);
      at.next_block = std::min((block + 1) * block_rows, shape.m);
      at.next_block_end = std::min((block + 2) * block_rows, shape.m);
      for (at.piece = 0; at.piece < shape.pieces; ++at.piece) {
        const bool prepares = fresh && at.piece == 0;
        at.tile_in_block = i % shape.groups * tiles.count;
        for (int64_t r = 0, index = 0; r < count; r += at.count, ++index, ++at.tile_in_block) {
          at.rows = rows + r * stride;
          at.scales = scales + r;
          at.first = block * block_rows + r;
          at.count = tiles.height(index);
          at.tile_in_group = index;
          at.next_prepared = (r + at.count < count ? fresh : fresh_next) ? at.first + at.count : -1;
          if (prepares) prepare(at.first, at.count, PreparedRows{rows + r * stride, stride, scales + r});
          multiply(at);
        }
      }
      fresh = fresh_next;
    }
  });
  if (out_of_memory.load(std::memory_order_relaxed)) return Status::internal("out of memory for a block of rows");
  return {};
}

}  // namespace kdq
