// Where a tile goes.
#pragma once

#include <cstdint>

namespace kdq {

// In which type results are stored.
enum class Result : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt32 = 3 };

// Where y lies, which decides how it is best written. By the size of the whole result, as measured on 1 MiB of L2 and
// 32 MiB of L3.
enum class Place : int {
  kNear = 0,    // in an L2 cache
  kFar = 1,     // in the L3 cache: its lines are worth asking for before the tile is done
  kMemory = 2,  // beyond: a product that is quick for its size (binary) gains 6 % by writing past the caches
};
constexpr int64_t kFarBytes = int64_t{1} << 20;
constexpr int64_t kMemoryBytes = int64_t{8} << 20;

// Writing past the caches takes whole vectors at aligned addresses.
inline Place place_of(const void* y, int64_t rows, int64_t row_bytes) {
  const int64_t bytes = rows * row_bytes;
  const bool aligned = reinterpret_cast<uintptr_t>(y) % 64 == 0 && row_bytes % 64 == 0;
  if (bytes >= kMemoryBytes && aligned) return Place::kMemory;
  return bytes >= kFarBytes ? Place::kFar : Place::kNear;
}

// The first `cols` channels of each of a tile's rows go to y, rows y_stride elements apart.
struct TileOutput {
  Result type;
  Place place;
  int rows;
  int cols;
  void* y;
  int64_t y_stride;
};

}  // namespace kdq
