// How rows are cut into blocks and tiles.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kdq {

// Rows of a block: about `most`, by a third more at most, and all blocks of one size but for a row or so. Executors
// hand out equal numbers of blocks, so that a smaller last one would leave a thread idle, and of an odd number of them
// two threads would both prepare the one in the middle.
inline int64_t even_block(int64_t rows, int64_t most) {
  int64_t blocks = std::max<int64_t>(1, (rows + most - 1) / most);
  if (blocks > 1 && blocks % 2 == 1) blocks += rows <= (blocks - 1) * (most + most / 3) ? -1 : 1;
  return std::max<int64_t>(1, (rows + blocks - 1) / blocks);
}

// Rows cut into as few tiles as possible, of at most `most` rows, none much smaller than the others: a tile of one row
// keeps too few sums in flight to hide the latency of a multiplication. rows > 0.
struct EvenTiles {
  int64_t count;
  int64_t low;     // rows of most tiles
  int64_t higher;  // how many of the first have one more

  EvenTiles(int64_t rows, int64_t most) : count((rows + most - 1) / most), low(rows / count), higher(rows % count) {}
  int height(int64_t index) const { return static_cast<int>(low + (index < higher ? 1 : 0)); }
};

}  // namespace kdq
