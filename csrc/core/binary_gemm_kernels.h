// What an ISA provides for the binary family: the register tile, and plain functions on raw pointers.
//
// With many rows, weights are interleaved into panels of `nr` channels, word by word, so that vector lanes are channels
// and one word of an activation row is broadcast: no sum crosses a lane. With few rows that interleaving would cost
// more than it gains, and `direct` runs along K on the row-major weights instead.
#pragma once

#include <cstdint>

#include "core/elements.h"
#include "core/tile_output.h"
#include "kdq/types.h"

namespace kdq {

// What turns the counts of differing bits into results. Pointers are those of the tile's first channel.
//   dot = k - 2 * count;  y = dot * weight_scale + bias
struct BinaryEpilogue {
  int32_t k;
  const float* weight_scale;
  const float* bias;  // or nullptr
};

struct BinaryTile {
  int mr;           // rows of a full tile
  int nr;           // channels of a panel
  int direct_rows;  // up to this many rows, `direct` is faster
};

struct BinaryKernels {
  BinaryTile size;

  // One row of k values -> ceil(k / 64) words, tail bits zero. Indexed by DType.
  void (*pack_row[3])(const void* x, int64_t k, uint64_t* bits);

  // counts [rows, nr] of differing bits: rows of `words` words each (row_words apart) against panel [words, nr].
  void (*tile)(const uint64_t* a, int64_t row_words, int rows, const uint64_t* panel, int64_t words, int32_t* counts);

  // counts [channels] of differing bits: one row against `channels` rows of `words` words.
  void (*direct)(const uint64_t* a, const uint64_t* b, int64_t words, int channels, int32_t* counts);

  // A tile of counts into y.
  void (*store_int32)(const int32_t* counts, const BinaryEpilogue& epilogue, const TileOutput& out);
  void (*store[3])(const int32_t* counts, const BinaryEpilogue& epilogue, const TileOutput& out);
};

// The table of an ISA whose loops are the static members of L. L lives in an anonymous namespace, so nothing here has
// external linkage.
template <class L>
constexpr BinaryKernels make_binary_kernels(const BinaryTile& size) {
  return {
      size,
      {L::template pack_row<float>, L::template pack_row<BFloat16>, L::template pack_row<Float16>},
      L::tile,
      L::direct,
      L::store_int32,
      {L::template store_linear<float>, L::template store_linear<BFloat16>, L::template store_linear<Float16>},
  };
}

extern const BinaryKernels kBinaryReference;
extern const BinaryKernels kBinaryAvx2;
extern const BinaryKernels kBinaryAvx512;
extern const BinaryKernels kBinaryAvx512Vpopcntdq;

}  // namespace kdq
