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

// As copy_unit(), into the bits of a byte from `shift` on.
inline void add_unit(int8_t* to, const int8_t* from, int64_t count, int shift, int bits) {
  for (int64_t i = 0; i < count; ++i) {
    const unsigned value = static_cast<unsigned>(from[i]) & ((1U << bits) - 1);
    to[i] = static_cast<int8_t>(static_cast<unsigned>(to[i]) | value << shift);
  }
}

// One panel: channels [first, first + channels) of w, with zeros where channels or k end, and the sums of the channels.
void pack_panel(const int8_t* w, const PackedHeader& header, int64_t first, int64_t channels, int8_t* panel,
                int32_t* column_sum) {
  const int64_t ku = header.ku;
  const int bits = static_cast<int>(header.bits);
  const int64_t shares = 8 / bits;
  for (int64_t c = 0; c < channels; ++c) {
    column_sum[c] = 0;
    if (first + c >= header.n) continue;
    const int8_t* channel = w + (first + c) * header.k;
    int32_t sum = 0;
    for (int64_t i = 0; i < header.k; ++i) sum += channel[i];
    column_sum[c] = sum * (1 << (8 - bits));
    for (int64_t i = 0, u = 0; i < header.k; i += ku, ++u) {
      int8_t* unit = panel + (u / shares * channels + c) * ku;
      const int64_t count = std::min(ku, header.k - i);
      shares == 1 ? copy_unit(unit, channel + i, count)
                  : add_unit(unit, channel + i, count, static_cast<int>(u % shares) * bits, bits);
    }
  }
}

// Every value fits into the bits.
Status check_range(const int8_t* w, int64_t n, int64_t k, int bits) {
  const int most = (1 << (bits - 1)) - 1;
  for (int64_t i = 0; bits < 8 && i < n * k; ++i) {
    if (w[i] >= -most - 1 && w[i] <= most) continue;
    return Status::invalid("w: expected values from " + std::to_string(-most - 1) + " to " + std::to_string(most) +
                           " for " + std::to_string(bits) + " bits, got " + std::to_string(w[i]) + " at [" +
                           std::to_string(i / k) + ", " + std::to_string(i % k) + "]");
  }
  return {};
}

Status open_in_force(const void* packed, size_t packed_bytes, PackedWeight* weight, Int8Tile* tile) {
  const Int8Kernels* kernels = nullptr;
  Status status = int8_kernels(&kernels);
  if (!status.ok()) return status;
  *tile = kernels->size;
  return open_packed(*tile, packed, packed_bytes, weight);
}

}  // namespace

Status int8_packed_bytes(int64_t n, int64_t k, size_t* bytes, int bits) {
  const Int8Kernels* kernels = nullptr;
  Status status = int8_kernels(&kernels);
  PackedHeader header;
  if (status.ok()) status = make_packed_header(kernels->size, n, k, bits, &header);
  if (status.ok()) *bytes = static_cast<size_t>(header.bytes);
  return status;
}

Status pack_int8_weight(const int8_t* w, int64_t n, int64_t k, void* packed, size_t packed_bytes,
                        const ParallelFor& parallel_for, int bits) {
  const Int8Kernels* kernels = nullptr;
  Status status = int8_kernels(&kernels);
  PackedHeader header;
  if (status.ok()) status = make_packed_header(kernels->size, n, k, bits, &header);
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
  status = check_range(w, n, k, bits);
  if (!status.ok()) return status;
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
  const int64_t shares = 8 / weight.bits;
  const int64_t step = weight.panel_channels * ku;
  parallel_range(parallel_for, weight.n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      const int64_t panel = channel / tile.nr;
      const int8_t* first = weight.panel + panel * weight.panel_bytes + channel % tile.nr * ku;
      int8_t* row = w + channel * weight.k;
      for (int64_t i = 0, u = 0; i < weight.k; i += ku, ++u) {
        const int64_t count = std::min(ku, weight.k - i);
        copy_unit(row + i, first + u / shares * step, count);
        const int above = 8 - weight.bits * static_cast<int>(u % shares + 1);  // bits of other units
        for (int64_t j = 0; shares > 1 && j < count; ++j) {
          row[i + j] = static_cast<int8_t>(static_cast<int8_t>(row[i + j] << above) >> (8 - weight.bits));
        }
      }
    }
  });
  return status;
}

}  // namespace kdq
