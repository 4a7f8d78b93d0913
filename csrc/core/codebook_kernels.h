// What an ISA provides for the codebook family: the register tile, and plain functions on raw pointers.
//
// A tile multiplies up to `mr` rows of float32 by up to `panels_at_once` panels of 16 channels. Their indices are
// looked up as they are read; nothing decoded is ever stored.
#pragma once

#include <cstdint>

#include "core/elements.h"
#include "core/tile_output.h"
#include "kdq/types.h"

namespace kdq {

constexpr int kCodebookTable = 32;  // centroids that a look-up may reach, whatever the bits

// Some panels side by side.
struct CodebookPanels {
  const uint32_t* words;  // [panels][steps][16]
  int64_t stride;         // words from a panel to the next
  int count;
};

// A tile: out.rows prepared rows times the panels, of which none lies wholly beyond out.cols.
struct CodebookTileCall {
  const float* rows;
  int64_t row_stride;  // elements
  CodebookPanels panels;
  int64_t steps;       // words along k; the rows hold zeros beyond k
  int bits;            // of an index
  const float* table;  // [kCodebookTable]: the centroids, over and over, so that bits above an index do not matter
  const float* bias;   // of the tile's first channel, or nullptr
  Activation activation;
  TileOutput out;
};

struct CodebookKernels {
  int mr;                           // rows of a full tile
  int (*panels_at_once)(int rows);  // of a tile of so many rows

  // One row of k activations -> float32, with zeros up to `padded` elements. Indexed by DType.
  void (*widen[3])(const void* x, int64_t k, int64_t padded, float* row);

  void (*tile)(const CodebookTileCall& call);
};

// The table of an ISA whose loops are the static members of L. L lives in an anonymous namespace, so nothing here has
// external linkage.
template <class L>
constexpr CodebookKernels make_codebook_kernels(int mr) {
  return {mr,
          L::panels_at_once,
          {L::template widen<float>, L::template widen<BFloat16>, L::template widen<Float16>},
          L::tile};
}

extern const CodebookKernels kCodebookReference;
extern const CodebookKernels kCodebookAvx2;
extern const CodebookKernels kCodebookAvx512;

}  // namespace kdq
