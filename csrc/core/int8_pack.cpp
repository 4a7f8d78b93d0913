// Packing int8 weights into panels, and back. Students in training pack theirs anew at each step.
#include <algorithm>
#include <cstring>
#include <string>

#include "core/packed_weight.h"
#include "core/parallel_range.h"
#include "kdq/int8_gemm.h"

namespace kdq {
namespace {

// The sum of n values: bytes in eights, made unsigned by adding 128, into four sums of 16 bits, which hold so many.
int32_t sum_of(const int8_t* values, int64_t n) {
  constexpr int64_t kMostWords = 128;
  constexpr uint64_t kEven = 0x00FF00FF00FF00FF;
  int64_t sum = -128 * (n / 8 * 8);
  for (int64_t word = 0; word < n / 8; word += kMostWords) {
    const int64_t end = std::min(word + kMostWords, n / 8);
    uint64_t sums = 0;
    for (int64_t i = word; i < end; ++i) {
      uint64_t bytes = 0;
      std::memcpy(&bytes, values + 8 * i, sizeof(bytes));
      bytes ^= 0x8080808080808080;
      sums += (bytes & kEven) + (bytes >> 8 & kEven);
    }
    for (int shift = 0; shift < 64; shift += 16) sum += static_cast<int64_t>(sums >> shift & 0xFFFF);
  }
  for (int64_t i = n / 8 * 8; i < n; ++i) sum += values[i];
  return static_cast<int32_t>(sum);
}

// As many units as share bytes, from `values` on, in the bits that each has of them.
template <class Unit, int kBits>
inline Unit shared_bytes(const int8_t* values) {
  Unit bytes = 0;
  for (int share = 0; share < 8 / kBits; ++share) {
    int8_t kept[sizeof(Unit)];
    for (size_t i = 0; i < sizeof(Unit); ++i) {
      kept[i] = static_cast<int8_t>(values[share * sizeof(Unit) + i] & ((1 << kBits) - 1));
    }
    Unit unit = 0;
    std::memcpy(&unit, kept, sizeof(unit));
    bytes = static_cast<Unit>(bytes | unit << (share * kBits));
  }
  return bytes;
}

// Channels that are packed side by side, as a line of a panel is then written once and not anew for each; with more,
// rows that lie a multiple of 4 KiB apart would drive each other out of L1.
constexpr int64_t kChannelsAtOnce = 8;

template <class Body>
inline void for_each_channel(int64_t count, Body body) {
  if (count == kChannelsAtOnce) {  // a number that the compiler knows
    for (int64_t c = 0; c < kChannelsAtOnce; ++c) body(c);
  } else {
    for (int64_t c = 0; c < count; ++c) body(c);
  }
}

// Rows of k values to units side by side, `step` bytes from one group of shares to the next. Unit: an integer as large.
template <class Unit, int kBits>
void pack_channels(const int8_t* rows, int64_t k, int64_t count, int64_t step, int8_t* panel) {
  constexpr int64_t kValues = sizeof(Unit) * (8 / kBits);
  const auto put = [](int8_t* to, const int8_t* values) {
    const Unit bytes = shared_bytes<Unit, kBits>(values);
    std::memcpy(to, &bytes, sizeof(bytes));
  };
  int64_t i = 0;
  for (; i + kValues <= k; i += kValues, panel += step) {
    for_each_channel(count, [&](int64_t c) { put(panel + c * sizeof(Unit), rows + c * k + i); });
  }
  for (int64_t c = 0; i < k && c < count; ++c) {
    int8_t last[kValues] = {};
    std::copy(rows + c * k + i, rows + (c + 1) * k, last);
    put(panel + c * sizeof(Unit), last);
  }
}

// The inverse of shared_bytes().
template <class Unit, int kBits>
inline void values_of(Unit bytes, int8_t* values) {
  for (int share = 0; share < 8 / kBits; ++share, values += sizeof(Unit)) {
    const Unit unit = static_cast<Unit>(bytes >> (share * kBits));  // each value in the low bits of its byte
    std::memcpy(values, &unit, sizeof(unit));
    for (size_t i = 0; kBits < 8 && i < sizeof(Unit); ++i) {
      const auto top = static_cast<int8_t>(static_cast<uint8_t>(values[i]) << (8 - kBits));
      values[i] = static_cast<int8_t>(top >> (8 - kBits));
    }
  }
}

// The inverse of pack_channels().
template <class Unit, int kBits>
void unpack_channels(const int8_t* panel, int64_t k, int64_t count, int64_t step, int8_t* rows) {
  constexpr int64_t kValues = sizeof(Unit) * (8 / kBits);
  const auto take = [](const int8_t* from, int8_t* values) {
    Unit bytes = 0;
    std::memcpy(&bytes, from, sizeof(bytes));
    values_of<Unit, kBits>(bytes, values);
  };
  int64_t i = 0;
  for (; i + kValues <= k; i += kValues, panel += step) {
    for_each_channel(count, [&](int64_t c) { take(panel + c * sizeof(Unit), rows + c * k + i); });
  }
  for (int64_t c = 0; i < k && c < count; ++c) {
    int8_t last[kValues];
    take(panel + c * sizeof(Unit), last);
    std::copy_n(last, k - i, rows + c * k + i);
  }
}

// Both, for a size of units and a number of bits.
struct Channels {
  void (*pack)(const int8_t* rows, int64_t k, int64_t count, int64_t step, int8_t* panel);
  void (*unpack)(const int8_t* panel, int64_t k, int64_t count, int64_t step, int8_t* rows);
};

template <class Unit>
Channels channels_of_bits(int64_t bits) {
  if (bits == 8) return {pack_channels<Unit, 8>, unpack_channels<Unit, 8>};
  if (bits == 4) return {pack_channels<Unit, 4>, unpack_channels<Unit, 4>};
  return {pack_channels<Unit, 2>, unpack_channels<Unit, 2>};
}

Channels channels_of(int64_t ku, int64_t bits) {
  if (ku == 4) return channels_of_bits<uint32_t>(bits);
  if (ku == 2) return channels_of_bits<uint16_t>(bits);
  return channels_of_bits<uint8_t>(bits);
}

// One panel: channels [first, first + channels) of w, as far as they exist, and the sums of the channels. What is
// beyond them is zero already.
void pack_panel(const int8_t* w, const PackedHeader& header, int64_t first, int64_t channels, int8_t* panel,
                int32_t* column_sum) {
  const Channels of_unit = channels_of(header.ku, header.bits);
  const int64_t end = std::min(channels, header.n - first);
  for (int64_t c = 0; c < end; ++c) {
    column_sum[c] = sum_of(w + (first + c) * header.k, header.k) * (1 << (8 - header.bits));
  }
  for (int64_t c = 0; c < end; c += kChannelsAtOnce) {
    of_unit.pack(w + (first + c) * header.k, header.k, std::min(kChannelsAtOnce, end - c), channels * header.ku,
                 panel + c * header.ku);
  }
}

int64_t panels_worth_a_thread(const PackedWeight& weight) {
  constexpr int64_t kBytesWorthAThread = 1 << 16;
  return weight.panel_bytes < kBytesWorthAThread ? kBytesWorthAThread / (weight.panel_bytes + 1) + 1 : 1;
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
  parallel_range(parallel_for, weight.panels, panels_worth_a_thread(weight), [&](int64_t begin, int64_t end) {
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
  const Channels of_unit = channels_of(tile.ku, weight.bits);
  const int64_t step = weight.panel_channels * tile.ku;
  parallel_range(parallel_for, weight.panels, panels_worth_a_thread(weight), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * tile.nr;
      const int64_t channels = std::min<int64_t>(weight.panel_channels, weight.n - first);
      for (int64_t c = 0; c < channels; c += kChannelsAtOnce) {
        of_unit.unpack(weight.panel + p * weight.panel_bytes + c * tile.ku, weight.k,
                       std::min(kChannelsAtOnce, channels - c), step, w + (first + c) * weight.k);
      }
    }
  });
  return status;
}

}  // namespace kdq
