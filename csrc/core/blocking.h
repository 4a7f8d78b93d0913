// How rows are cut into blocks and tiles.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kdq {

// Rows of a block: at most `most`, and all blocks of one size but for a row or so. Executors hand out equal numbers of
// blocks, so a smaller last one would leave a thread idle.
inline int64_t even_block(int64_t rows, int64_t most) {
  const int64_t blocks = std::max<int64_t>(1, (rows + most - 1) / most);
  return std::max<int64_t>(1, (rows + blocks - 1) / blocks);
}

// Rows of the next tile when `left` are to be cut into as few tiles as possible, none much smaller than the others: a
// tile of one row keeps too few sums in flight to hide the latency of a multiplication.
inline int64_t next_tile(int64_t left, int64_t most) {
  const int64_t tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

}  // namespace kdq
