// Making and checking the header of a packed weight.
#include "core/packed_weight.h"

#include <cstring>
#include <string>

#include "core/kernel_choice.h"

namespace kdq {
namespace {

constexpr char kMagic[8] = {'K', 'D', 'Q', 'P', 'A', 'C', 'K', '\0'};
constexpr uint32_t kVersion = 2;

constexpr KernelChoice<Int8Kernels> kChoices[] = {
    {Isa::kReference, CpuExtra::kNone, &kInt8Reference},
#if defined(KDQ_HAVE_X86)
    {Isa::kAvx2, CpuExtra::kNone, &kInt8Avx2},              // vpmaddwd
    {Isa::kAvx2, CpuExtra::kAvxVnni, &kInt8AvxVnni},        // vpdpbusd
    {Isa::kAvx512, CpuExtra::kNone, &kInt8Avx512},          // vpmaddwd
    {Isa::kAvx512Vnni, CpuExtra::kNone, &kInt8Avx512Vnni},  // vpdpbusd
#endif
};

// By powers of two, as tiles' sizes are. Divisions, of which opening a weight has ten, take 40 ns, twice in each call.
int64_t divide(int64_t value, int64_t power) { return value >> __builtin_ctzll(static_cast<uint64_t>(power)); }
int64_t round_up(int64_t value, int64_t power) { return (value + power - 1) & -power; }

int64_t column_sum_bytes(int64_t padded_n) { return round_up(padded_n * 4, 64); }

// Odd factors (of the golden ratio and of xxHash) make each step invertible: no change of n or of k alone goes unseen.
uint64_t hash_shape(int64_t n, int64_t k) {
  const uint64_t mixed = static_cast<uint64_t>(n) * 0x9E3779B97F4A7C15U ^ static_cast<uint64_t>(k);
  return mixed * 0xC2B2AE3D27D4EB4FU;
}

std::string tile_name(uint32_t nr, uint32_t ku) {
  return std::to_string(nr) + " channels x " + std::to_string(ku) + " k";
}

}  // namespace

Status int8_kernels(const Int8Kernels** kernels) { return choose_kernels(kChoices, kernels); }

const Int8Bf16Kernels* int8_bf16_kernels([[maybe_unused]] const Int8Kernels& kernels) {
#if defined(KDQ_HAVE_X86)
  if (&kernels == &kInt8Avx512Vnni && cpu_has(CpuExtra::kBf16)) return &kInt8Avx512Bf16;
#endif
  return nullptr;
}

Status make_packed_header(const Int8Tile& tile, int64_t n, int64_t k, int bits, PackedHeader* header) {
  constexpr int64_t kLargest = int64_t{1} << 40;
  if (n < 0 || k < 0 || n > kLargest || k > kLargest) {
    return Status::invalid("n, k: expected sizes from 0 to 2^40, got " + std::to_string(n) + " and " +
                           std::to_string(k));
  }
  if (bits != 8 && bits != 4 && bits != 2) {
    return Status::invalid("bits: expected 8, 4 or 2, got " + std::to_string(bits));
  }
  const int64_t padded_n = round_up(n, n < tile.nr ? tile.lanes : tile.nr);
  int64_t bytes = 0;
  if (__builtin_mul_overflow(padded_n, divide(round_up(k, tile.ku * (8 / bits)), 8 / bits), &bytes)) {
    return Status::invalid("n, k: " + std::to_string(n) + " x " + std::to_string(k) + " weights do not fit 64 bits");
  }
  *header = {};
  std::memcpy(header->magic, kMagic, sizeof(kMagic));
  header->version = kVersion;
  header->bits = static_cast<uint32_t>(bits);
  header->nr = static_cast<uint32_t>(tile.nr);
  header->ku = static_cast<uint32_t>(tile.ku);
  header->lanes = static_cast<uint32_t>(tile.lanes);
  header->n = n;
  header->k = k;
  header->bytes = sizeof(PackedHeader) + static_cast<uint64_t>(column_sum_bytes(padded_n) + bytes);
  header->shape_check = hash_shape(n, k);
  return {};
}

PackedWeight locate_packed(const PackedHeader& header, const void* data) {
  const char* base = static_cast<const char*>(data) + sizeof(PackedHeader);
  PackedWeight weight;
  weight.n = header.n;
  weight.k = header.k;
  weight.panels = divide(round_up(header.n, header.nr), header.nr);
  weight.panel_channels = header.n < header.nr ? round_up(header.n, header.lanes) : header.nr;
  weight.bits = static_cast<int>(header.bits);
  const int64_t shares = 8 / weight.bits;
  weight.units = divide(round_up(header.k, header.ku * shares), header.ku);
  weight.panel_bytes = divide(weight.units, shares) * header.ku * weight.panel_channels;
  weight.column_sum = reinterpret_cast<const int32_t*>(base);
  weight.panel = reinterpret_cast<const int8_t*>(base + column_sum_bytes(weight.panels * weight.panel_channels));
  return weight;
}

Status open_packed(const Int8Tile& tile, const void* data, size_t bytes, PackedWeight* weight) {
  if (data == nullptr || bytes < sizeof(PackedHeader)) {
    return Status::invalid("packed: expected a packed weight, got " + std::to_string(bytes) +
                           " bytes, which is less than its 64-byte header");
  }
  PackedHeader header;
  std::memcpy(&header, data, sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) {
    return Status::invalid("packed: this is not a packed weight; make one with pack_int8_weight()");
  }
  if (header.version != kVersion) {
    return Status::invalid("packed: layout version " + std::to_string(header.version) + ", expected version " +
                           std::to_string(kVersion) + "; pack the weight again");
  }
  if (header.nr != static_cast<uint32_t>(tile.nr) || header.ku != static_cast<uint32_t>(tile.ku)) {
    return Status::invalid("packed: packed for panels of " + tile_name(header.nr, header.ku) +
                           ", but the instruction set in force reads " +
                           tile_name(static_cast<uint32_t>(tile.nr), static_cast<uint32_t>(tile.ku)) +
                           "; pack the weight again on this machine");
  }
  PackedHeader expected;
  Status status = make_packed_header(tile, header.n, header.k, static_cast<int>(header.bits), &expected);
  if (!status.ok() || std::memcmp(&expected, &header, sizeof(header)) != 0) {
    return Status::invalid("packed: the header is corrupt; pack the weight again");
  }
  if (header.bytes > bytes) {
    return Status::invalid("packed: truncated, " + std::to_string(bytes) + " of " + std::to_string(header.bytes) +
                           " bytes");
  }
  *weight = locate_packed(header, data);
  return {};
}

}  // namespace kdq
