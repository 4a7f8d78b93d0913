// Where a tile goes.
#pragma once

#include <cstdint>

namespace kdq {

constexpr int64_t kLine = 64;  // bytes of a cache line

// In which type results are stored. kBits: a bit a channel, in whole 64-bit words; a tile begins at a word's first bit.
enum class Result : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt32 = 3, kBits = 4 };

// Where y lies, which decides how it is best written. By the size of the whole result, as measured on 1 MiB of L2 and
// 32 MiB of L3.
enum class Place : int {
  kNear = 0,    // in an L2 cache
  kFar = 1,     // in the L3 cache: its lines are worth asking for before the tile is done
  kMemory = 2,  // beyond: a product that is quick for its size (binary) gains 6 % by writing past the caches
};

// The first `cols` channels of each of a tile's rows go to y, rows y_stride elements apart; an element of bits is a
// word.
struct TileOutput {
  Result type;
  int element_bytes;
  Place place;
  int rows;
  int cols;
  void* y;
  int64_t y_stride;
};

}  // namespace kdq
