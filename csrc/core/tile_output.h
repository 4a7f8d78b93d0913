// Where a tile goes.
#pragma once

#include <cstdint>

namespace kdq {

// In which type results are stored.
enum class Result : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt32 = 3 };

// A whole result of more bytes than this does not stay in the L2 cache between calls.
constexpr int64_t kFarBytes = 1024 * 1024;

// The first `cols` channels of each of a tile's rows go to y, rows y_stride elements apart.
struct TileOutput {
  Result type;
  int rows;
  int cols;
  void* y;
  int64_t y_stride;
  bool far;  // y is in no near cache: its lines are worth asking for before the tile is done
};

}  // namespace kdq
