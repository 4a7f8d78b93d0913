// The packed int8 weight blob: a 64-byte header, the int32 sum of each channel's weights, then the panels.
//
//   channels = nr, or n rounded up to `lanes` where that is less
//   column sums: int32 [ceil(n / channels) * channels], padded to a multiple of 64 bytes
//   panels:      int8 [ceil(n / channels)][ceil(k / ku)][channels][ku], padded with zeros
//
// Of weights of 4 or 2 bits, 2 or 4 units share bytes: the panels are [ceil(n / channels)][ceil(k / (ku * shares))]
// [channels][ku] bytes, of which unit i of each `shares` has the bits from i * bits on, in two's complement. Kernels
// take a value out into the upper bits of a byte, which is 2^(8 - bits) times the value, and column sums are as large;
// the scales of rows make up for it, exactly.
//
// nr and ku are the register tile of the ISA that packed it: a kernel reads nr output channels side by side, and of
// each of them ku consecutive values of k, what one dot-product instruction sums. Only the same tile can read a blob.
// lanes are the channels of one vector: a weight narrower than a panel has one of no more vectors than it needs, as it
// would otherwise be mostly zeros, far apart.
#pragma once

#include <cstdint>

#include "core/int8_gemm_kernels.h"
#include "kdq/status.h"

namespace kdq {

struct PackedHeader {
  char magic[8];
  uint32_t version;
  uint32_t bits;
  uint32_t nr;
  uint32_t ku;
  int64_t n;
  int64_t k;
  uint64_t bytes;        // of the whole blob
  uint64_t shape_check;  // hash of n and k: the only fields that could change and leave a header that fits its blob
  uint32_t lanes;
  uint32_t reserved;  // zero
};
static_assert(sizeof(PackedHeader) == 64, "the header is one cache line");

// A checked blob, ready for the kernels.
struct PackedWeight {
  int64_t n = 0;
  int64_t k = 0;
  int64_t panels = 0;
  int64_t panel_channels = 0;
  int64_t units = 0;  // steps along k
  int64_t panel_bytes = 0;
  int bits = 8;
  const int32_t* column_sum = nullptr;
  const int8_t* panel = nullptr;
};

// The header of an [n, k] weight for a tile; fails when n or k is negative or the size does not fit, or bits are others
// than 8, 4 and 2.
Status make_packed_header(const Int8Tile& tile, int64_t n, int64_t k, int bits, PackedHeader* header);

// Where the parts of a blob lie. data need not be complete for this.
PackedWeight locate_packed(const PackedHeader& header, const void* data);

// Checks that data [bytes] is a whole blob for this tile.
Status open_packed(const Int8Tile& tile, const void* data, size_t bytes, PackedWeight* weight);

// The tables of the ISA in force.
Status int8_kernels(const Int8Kernels** kernels);

// What reads the same panels as these; nullptr where this CPU has nothing of the kind.
const Int8Bf16Kernels* int8_bf16_kernels(const Int8Kernels& kernels);

}  // namespace kdq
