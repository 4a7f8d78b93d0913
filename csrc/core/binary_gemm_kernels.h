// What an ISA provides for the binary family: the register tile, and plain functions on raw pointers.
//
// With many rows, weights are interleaved into panels of `nr` channels, step by step along K, so that vector lanes are
// channels and one step of an activation row is broadcast: no sum crosses a lane. With few rows that interleaving would
// cost more than it gains, and `direct` runs along K on the row-major weights instead.
#pragma once

#include <cstdint>

#include "core/elements.h"
#include "core/int8_gemm_kernels.h"
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

// Products of bit planes (kdq/bitplanes.h) run over K once for each pair of a plane of the rows and one of the weights,
// in the order of their weights in the sum, the largest first: counts are doubled where the next is half as large.
// Plain signs are one pass over one plane.
struct PlanePass {
  int64_t rows;     // bytes from the first plane of a row to this one
  int64_t weights;  // likewise, of a panel or, in `direct`, of row-major weights
  bool doubles;     // the counts so far, before it
};
constexpr int kMostPlanes = 8;

// The passes of so many planes that lie so many bytes apart.
struct PlanePasses {
  PlanePass at[kMostPlanes * kMostPlanes];
  int count;

  PlanePasses(int row_planes, int weight_planes, int64_t row_bytes, int64_t weight_bytes) : count(0) {
    for (int power = row_planes + weight_planes - 2; power >= 0; --power) {
      bool doubles = count > 0;
      for (int p = 0; p < row_planes; ++p) {
        const int q = power - p;
        if (q < 0 || q >= weight_planes) continue;
        at[count++] = {p * row_bytes, q * weight_bytes, doubles};
        doubles = false;
      }
    }
  }
};

// What turns the counts of bit planes, weighted sums over passes, into results. Pointers are those of the tile's first
// row and channel; sums wrap modulo 2^32, but twice the product fits.
//   product = (row_term + column_factor * layer.column_sum - count_factor * count) / 2
// and further as in the int8 family.
struct PlaneEpilogue {
  int32_t column_factor;
  int32_t count_factor;
  const int32_t* row_term;
  const float* row_scale;
  Int8Epilogue layer;
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
  const PlanePasses* passes;
  const PlaneEpilogue* planes;  // instead of `epilogue`; or nullptr
};

// Row-major weights may come from memory: what lies at least 8 KiB on is asked for. Words from one that `interleave`
// reads to that one, where it reads so many channels side by side: whole groups of these.
constexpr int64_t kWordsAhead = 1024;
constexpr int64_t words_ahead(int64_t words, int channels) {
  const int64_t side_by_side = words * channels;
  return side_by_side == 0 ? 0 : (kWordsAhead + side_by_side - 1) / side_by_side * side_by_side;
}

constexpr int kMostBinaryRows = 16;  // no tile has more

constexpr int kDirectChannels = 64;

// One row of `words` 64-bit words a plane against out.cols row-major channels, at most kDirectChannels.
struct BinaryDirectCall {
  const uint64_t* a;
  const uint64_t* b;
  int64_t words;
  BinaryEpilogue epilogue;
  TileOutput out;
  const PlanePasses* passes;
  const PlaneEpilogue* planes;  // instead of `epilogue`; or nullptr
};

// One row of k values -> the planes of their integers on an unsigned grid of so many bits, `stride` words apart, tail
// bits zero.
struct PlaneRowCall {
  const void* x;
  int64_t k;
  StaticGrid grid;
  int bits;
  uint64_t* planes;
  int64_t stride;
};

// Of a row: the sum of its integers, and whether there is a NaN in it, whose integers do not matter then.
struct PlaneRow {
  int64_t sum;
  bool has_nan;
};

struct BinaryKernels {
  BinaryTile size;

  // One row of k values -> ceil(k / 64) words, tail bits zero. Indexed by DType.
  void (*pack_row[3])(const void* x, int64_t k, uint64_t* bits);

  // Indexed by DType.
  PlaneRow (*pack_planes[3])(const PlaneRowCall& call);

  // Row-major channels, at most nr of `words` 64-bit words each, -> a panel; missing channels are zero.
  void (*interleave)(const uint64_t* b, int64_t words, int channels, char* panel);

  // A row's bits, of `words` 64-bit words, -> its steps. The bits may be the end of `steps`' memory.
  void (*spread)(const uint64_t* bits, int64_t words, char* steps);

  void (*tile)(const BinaryTileCall& call);

  void (*direct)(const BinaryDirectCall& call);
};

// The table of an ISA whose loops are the static members of L. L lives in an anonymous namespace, so nothing here has
// external linkage.
template <class L>
constexpr BinaryKernels make_binary_kernels(const BinaryTile& size) {
  return {
      size,
      {L::template pack_row<float>, L::template pack_row<BFloat16>, L::template pack_row<Float16>},
      {L::template pack_planes<float>, L::template pack_planes<BFloat16>, L::template pack_planes<Float16>},
      L::interleave,
      L::spread,
      L::tile,
      L::direct,
  };
}

extern const BinaryKernels kBinaryReference;
extern const BinaryKernels kBinaryAvx2;
extern const BinaryKernels kBinaryAvx512;
extern const BinaryKernels kBinaryAvx512Vpopcntdq;

}  // namespace kdq
