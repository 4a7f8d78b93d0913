// What an ISA provides for the int8 family: the register tile, and plain functions on raw pointers. The core does
// validation, blocking and threads, and knows nothing else of the ISA.
//
// A product runs in two steps. *Prepare* turns rows of activations into the form that the dot-product instruction
// reads (u8 for VNNI, s16 for pmaddwd), quantizing on the way. *Tile* multiplies up to `mr` prepared rows (or twice as
// many) by panels of `nr` output channels into exact int32, and turns these into results before they leave the
// registers.
#pragma once

#include <cstdint>

#include "core/elements.h"
#include "core/tile_output.h"
#include "kdq/types.h"

namespace kdq {

// Static affine quantization of activations: q = clamp(nearbyint(x * inverse) + zero_point, 0, quant_max).
struct StaticGrid {
  float inverse;
  int32_t zero_point;
  int32_t quant_max;
};

// What turns acc, the raw sums of one tile, into results. Pointers are those of the tile's first channel.
//   exact = acc - offset * column_sum
//   y     = activation(exact * min(row_scale * weight_scale, FLT_MAX) + bias)
// offset is what preparation added to each signed activation, or the zero point.
struct Int8Epilogue {
  const int32_t* column_sum;
  int32_t offset;
  const float* weight_scale;
  const float* bias;  // or nullptr
  Activation activation;
};

struct Int8Tile {  // nr, lanes and ku are powers of two
  int mr;          // rows of a full tile
  int nr;          // output channels of a panel
  int lanes;       // of a vector of sums; a weight narrower than nr has whole vectors, no more than it needs
  int ku;          // consecutive k that one dot-product instruction sums: side by side in a panel and in a prepared row
  int element_bytes;      // of a prepared activation
  int32_t signed_offset;  // added to int8 activations to make them u8: 128, or 0
};

// Rows of a full tile, if panels have so many channels. Half a panel leaves registers for the sums of twice as many
// rows, and a step of 6 x 1 products would be bound by their latency and by its loads.
constexpr int tile_rows(const Int8Tile& size, int64_t panel_channels) {
  return panel_channels <= size.nr / 2 ? 2 * size.mr : size.mr;
}

// The bits of a byte that a weight of `bits` bits is taken to, in each unit's turn: see packed_weight.h.
constexpr char top_bits(int bits) { return static_cast<char>(0xFF << (8 - bits)); }

// Panels side by side: `count` of them, each `stride` bytes after the one before, with `step` bytes for each step along
// k.
struct PanelGroup {
  const int8_t* first;
  int64_t stride;
  int64_t step;
  int count;
};

// How many panels a tile of so many rows takes at once: few rows of one panel would keep too few sums in flight to hide
// the latency of the dot products, and the registers are free.
constexpr int kMostPanels = 4;
constexpr int panels_at_once(int mr, int rows) {
  return mr / rows > kMostPanels ? kMostPanels : mr / rows > 1 ? mr / rows : 1;
}

// In a weight-only tile each vector of weights takes two registers more, on its way from integer to float.
constexpr int float_panels_at_once(int mr, int rows) { return panels_at_once(mr, 3 * rows); }

// A tile: out.rows prepared rows (at most tile_rows(), or size.mr if weight-only) times the panels. panels.count is 1
// or what the functions above say, and no panel lies wholly beyond out.cols. A streamed tile may be of a piece of k:
// rows, panels and units are the piece's then, and the raw sums go on from those of the pieces before.
struct Int8TileCall {
  const void* rows;
  int64_t row_stride;  // bytes
  const float* row_scale;
  PanelGroup panels;
  int64_t units;  // steps along k
  Int8Epilogue epilogue;
  TileOutput out;
  const char* ahead;           // what is read after this tile, to be asked for meanwhile: from here on,
  int64_t ahead_step;          // as many bytes on at each step along k, or 0 for nothing
  const int32_t* sums_before;  // of a streamed tile: [rows][nr], or nullptr where k begins;
  int32_t* sums_after;         // where they go instead of y, or nullptr where k ends
};

// Rows of k activations, one behind the other, -> prepared rows of k_padded elements (k rounded up to ku; the tail is
// zero), `stride` bytes apart, and the scale of each: NaN where the whole row of outputs must be NaN (a NaN in it or,
// quantized dynamically, an inf); its integers do not matter then.
struct Int8RowsCall {
  const void* x;
  int64_t k;
  int count;
  void* rows;
  int64_t stride;
  float* scales;
};

using Int8TileFunction = void (*)(const Int8TileCall& call);

// `streamed`: for weights that come from memory. It takes at most size.mr rows and one panel, and asks for what is read
// next at each step. nullptr where there is none.
struct Int8Tiles {
  Int8TileFunction plain;
  Int8TileFunction streamed;
  int streamed_rows;  // from so many on: with fewer, several panels at once are quicker
};

struct Int8Kernels {
  Int8Tile size;
  int64_t ahead_step;  // bytes that a plain tile asks for at a step along k, 0 if it does not

  // Indexed by DType where the input is floating point. Those of integers and for the weight-only product set no
  // scales.
  void (*prepare_int8)(const Int8RowsCall& call);
  void (*prepare_dynamic[3])(const Int8RowsCall& call);
  void (*prepare_static[3])(const Int8RowsCall& call, const StaticGrid& grid, float scale);
  void (*widen[3])(const Int8RowsCall& call);  // float rows for the weight-only product

  // The scales of prepare_dynamic alone: NaN or inf where a row has such values.
  void (*row_scales[3])(const void* x, int rows, int64_t k, float* scales);

  Int8Tiles tiles;
  // Of weights of 4 and of 2 bits, rows up to size.mr.
  Int8Tiles four_bit_tiles;
  Int8Tiles two_bit_tiles;
  Int8Tiles weight_only_tiles;  // rows of float32; no int32 result
};

// The weight-only product of bfloat16 rows on a CPU that multiplies bfloat16 natively, twice as fast as float32. int8
// values are exact in bfloat16 and products of two in float32: only the order of the sums, and what becomes of numbers
// below FLT_MIN, differs from weight_only_tiles.
struct Int8Bf16Kernels {
  int mr;  // rows of a full tile

  // A panel of so many bytes, `step` to each of its units, [units][channels][4] -> [units][2][channels][2] of bfloat16.
  void (*widen_panel)(const int8_t* panel, int64_t bytes, int64_t step, int8_t* widened);

  // Rows of bfloat16 times one panel.
  void (*tile)(const Int8TileCall& call);
  void (*widened_tile)(const Int8TileCall& call);  // the same of a panel that has been widened
};

// The table of an ISA whose loops are the static members of L. L lives in an anonymous namespace, so nothing here has
// external linkage.
template <class L>
constexpr Int8Kernels make_int8_kernels(const Int8Tile& size) {
  return {
      size,
      L::kAheadStep,
      L::prepare_int8,
      {L::template prepare_dynamic<float>, L::template prepare_dynamic<BFloat16>, L::template prepare_dynamic<Float16>},
      {L::template prepare_static<float>, L::template prepare_static<BFloat16>, L::template prepare_static<Float16>},
      {L::template widen<float>, L::template widen<BFloat16>, L::template widen<Float16>},
      {L::template row_scales<float>, L::template row_scales<BFloat16>, L::template row_scales<Float16>},
      L::kTiles,
      L::template kFewBitTiles<4>,
      L::template kFewBitTiles<2>,
      L::kWeightOnlyTiles,
  };
}

extern const Int8Kernels kInt8Reference;
extern const Int8Kernels kInt8Avx2;
extern const Int8Kernels kInt8AvxVnni;
extern const Int8Kernels kInt8Avx512;
extern const Int8Kernels kInt8Avx512Vnni;
extern const Int8Bf16Kernels kInt8Avx512Bf16;

}  // namespace kdq
