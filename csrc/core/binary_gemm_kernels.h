// What an ISA provides for the binary family: the register tile, and plain functions on raw pointers.
//
// With many rows, weights are interleaved into panels of `nr` channels, step by step along K, so that vector lanes are
// channels and one step of an activation row is broadcast: no sum crosses a lane. With few rows that interleaving would
// cost more than it gains, and `direct` runs along K on the row-major weights instead.
#pragma once

#include <cstdint>

#include "core/elements.h"
#include "core/tile_output.h"
#include "kdq/types.h"

namespace kdq {

// What turns the counts of differing bits into results. Pointers are those of the tile's first channel.
//   dot = k - 2 * count;  y = dot * weight_scale + bias, or, of Result::kBits, dot < threshold
struct BinaryEpilogue {
  int32_t k;
  const float* weight_scale;
  const float* bias;  // or nullptr
  const int32_t* threshold;
};

struct BinaryTile {
  int mr;           // rows of a full tile
  int nr;           // channels of a panel; a multiple of 64, so that no word of bits is two tiles'
  int step_bits;    // bits of a row that one step along K takes
  int step_bytes;   // what they take in a prepared row, and a channel's in a panel
  int direct_rows;  // up to this many rows, `direct` is faster
};

// A tile: out.rows rows (at most size.mr) times one panel.
struct BinaryTileCall {
  const char* rows;    // prepared by `spread`
  int64_t row_stride;  // bytes
  const char* panel;   // [steps, nr]
  int64_t steps;
  BinaryEpilogue epilogue;
  TileOutput out;
  const char* ahead;  // what is read later, for kernels that ask meanwhile: a line a step from here on; or nullptr
  // What is subtracted from the dots of each row, by channel, or nullptr for nothing; or nullptr where no row has any.
  const int32_t* const* corrections;
};

constexpr int kMostBinaryRows = 16;  // no tile has more

constexpr int kDirectChannels = 64;

struct BinaryKernels {
  BinaryTile size;

  // One row of k values -> ceil(k / 64) words, tail bits zero. Indexed by DType.
  void (*pack_row[3])(const void* x, int64_t k, uint64_t* bits);

  // Row-major channels, at most nr of `words` 64-bit words each, -> a panel; missing channels are zero.
  void (*interleave)(const uint64_t* b, int64_t words, int channels, char* panel);

  // A row's bits, of `words` 64-bit words, -> its steps. The bits may be the end of `steps`' memory.
  void (*spread)(const uint64_t* bits, int64_t words, char* steps);

  void (*tile)(const BinaryTileCall& call);

  // One row of `words` 64-bit words against out.cols row-major channels, at most kDirectChannels.
  void (*direct)(const uint64_t* a, const uint64_t* b, int64_t words, const BinaryEpilogue& epilogue,
                 const TileOutput& out);
};

// The table of an ISA whose loops are the static members of L. L lives in an anonymous namespace, so nothing here has
// external linkage.
template <class L>
constexpr BinaryKernels make_binary_kernels(const BinaryTile& size) {
  return {
      size,          {L::template pack_row<float>, L::template pack_row<BFloat16>, L::template pack_row<Float16>},
      L::interleave, L::spread,
      L::tile,       L::direct,
  };
}

extern const BinaryKernels kBinaryReference;
extern const BinaryKernels kBinaryAvx2;
extern const BinaryKernels kBinaryAvx512;
extern const BinaryKernels kBinaryAvx512Vpopcntdq;

}  // namespace kdq
