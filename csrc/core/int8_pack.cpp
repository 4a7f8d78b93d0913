// Packing int8 weights into panels, and back. The loops know the tile by its two numbers only.
#include <algorithm>
#include <cstring>
#include <string>

#include "core/packed_weight.h"
#include "core/parallel_range.h"
#include "kdq/int8_gemm.h"

namespace kdq {
namespace {

// Copies a unit, or what is left of one at the end of k. Sizes known to the compiler make it one move, not a call.
inline void copy_unit(int8_t* to, const int8_t* from, int64_t count) {
  if (count == 4) {
    std::memcpy(to, from, 4);
  } else if (count == 2) {
    std::memcpy(to, from, 2);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

// One panel: channels [first, first + channels) of w, with zeros where channels or k end, and the sums of the channels.
void pack_panel(const int8_t* w, const PackedHeader& header, int64_t first, int64_t channels, int8_t* panel,
                int32_t* column_sum) {
  const int64_t ku = header.ku;
  for (int64_t c = 0; c < channels; ++c) {
    column_sum[c] = 0;
    if (first + c >= header.n) continue;
    const int8_t* channel = w + (first + c) * header.k;
    int32_t sum = 0;
    for (int64_t i = 0; i < header.k; ++i) sum += channel[i];
    column_sum[c] = sum;
    int8_t* unit = panel + c * ku;
    for (int64_t i = 0; i < header.k; i += ku, unit += channels * ku) {
      copy_unit(unit, channel + i, std::min(ku, header.k - i));
    }
  }
}

Status open_in_force(const void* packed, size_t packed_bytes, PackedWeight* weight, Int8Tile* tile) {
  const Int8Kernels* kernels = nullptr;
  Status status = int8_kernels(&kernels);
  if (!status.ok()) return status;
  *tile = kernels->size;
  return open_packed(*tile, packed, packed_bytes, weight);
}

}  // namespace

Status int8_packed_bytes(int64_t n, int64_t k, size_t* bytes) {
  const Int8Kernels* kernels = nullptr;
  Status status = int8_kernels(&kernels);
  PackedHeader header;
  if (status.ok()) status = make_packed_header(kernels->size, n, k, &header);
  if (status.ok()) *bytes = static_cast<size_t>(header.bytes);
  return status;
}

Status pack_int8_weight(const int8_t* w, int64_t n, int64_t k, void* packed, size_t packed_bytes,
                        const ParallelFor& parallel_for) {
  const Int8Kernels* kernels = nullptr;
  Status status = int8_kernels(&kernels);
  PackedHeader header;
  if (status.ok()) status = make_packed_header(kernels->size, n, k, &header);
  if (!status.ok()) return status;
  if (k > kInt8MaxK) {
    return Status::invalid("w: K = " + std::to_string(k) + " would overflow int32 sums; expected at most " +
                           std::to_string(kInt8MaxK));
  }
  if (packed == nullptr || packed_bytes < header.bytes) {
    return Status::invalid("packed: expected a buffer of " + std::to_string(header.bytes) + " bytes, got " +
                           std::to_string(packed_bytes));
  }
  if (n * k > 0 && w == nullptr) return Status::invalid("w: expected a pointer, got null");
  std::memset(packed, 0, packed_bytes);
  std::memcpy(packed, &header, sizeof(header));
  const PackedWeight weight = locate_packed(header, packed);
  int8_t* panels = const_cast<int8_t*>(weight.panel);
  int32_t* column_sum = const_cast<int32_t*>(weight.column_sum);
  constexpr int64_t kBytesWorthAThread = 1 << 16;
  const int64_t grain = weight.panel_bytes < kBytesWorthAThread ? kBytesWorthAThread / (weight.panel_bytes + 1) + 1 : 1;
  parallel_range(parallel_for, weight.panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_panel(w, header, p * header.nr, weight.panel_channels, panels + p * weight.panel_bytes,
                 column_sum + p * header.nr);
    }
  });
  return status;
}

Status int8_packed_shape(const void* packed, size_t packed_bytes, int64_t* n, int64_t* k) {
  PackedWeight weight;
  Int8Tile tile;
  Status status = open_in_force(packed, packed_bytes, &weight, &tile);
  if (!status.ok()) return status;
  *n = weight.n;
  *k = weight.k;
  return status;
}

Status unpack_int8_weight(const void* packed, size_t packed_bytes, int8_t* w, const ParallelFor& parallel_for) {
  PackedWeight weight;
  Int8Tile tile;
  Status status = open_in_force(packed, packed_bytes, &weight, &tile);
  if (!status.ok()) return status;
  if (weight.n * weight.k > 0 && w == nullptr) return Status::invalid("w: expected a pointer, got null");
  const int64_t ku = tile.ku;
  const int64_t step = weight.panel_channels * ku;
  parallel_range(parallel_for, weight.n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      const int64_t panel = channel / tile.nr;
      const int8_t* unit = weight.panel + panel * weight.panel_bytes + channel % tile.nr * ku;
      int8_t* row = w + channel * weight.k;
      for (int64_t i = 0; i < weight.k; i += ku, unit += step) {
        copy_unit(row + i, unit, std::min(ku, weight.k - i));
      }
    }
  });
  return status;
}

}  // namespace kdq
