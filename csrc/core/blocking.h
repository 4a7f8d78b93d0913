// How rows are cut into blocks.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kdq {

// Rows of a block: at most about `most`, whole tiles, and all blocks of nearly one size. Executors hand out equal
// numbers of blocks, so a small last one would leave a thread idle.
inline int64_t even_block(int64_t rows, int64_t most, int64_t tile) {
  const int64_t blocks = std::max<int64_t>(1, (rows + most - 1) / most);
  const int64_t tiles = (rows + tile - 1) / tile;
  return std::max<int64_t>(1, (tiles + blocks - 1) / blocks) * tile;
}

}  // namespace kdq
