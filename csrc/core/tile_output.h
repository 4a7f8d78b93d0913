// Where an epilogue puts a tile.
#pragma once

#include <cstdint>

namespace kdq {

// Which part of a tile [rows, width] is wanted, and where it goes: the first cols of each row, to rows of y that lie
// y_stride elements apart.
struct TileOutput {
  int rows;
  int width;
  int cols;
  void* y;
  int64_t y_stride;
};

}  // namespace kdq
