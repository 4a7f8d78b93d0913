// Public functions of the binary family: validation, interleaving of the weights, blocking, threads.
#include "kdq/binary_gemm.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "core/binary_gemm_kernels.h"
#include "core/blocking.h"
#include "core/format.h"
#include "core/kernel_choice.h"
#include "core/parallel_range.h"
#include "core/scratch.h"

namespace kdq {
namespace {

constexpr KernelChoice<BinaryKernels> kChoices[] = {
    {Isa::kReference, CpuExtra::kNone, &kBinaryReference},
#if defined(KDQ_HAVE_X86)
    {Isa::kAvx2, CpuExtra::kNone, &kBinaryAvx2},
    {Isa::kAvx512, CpuExtra::kNone, &kBinaryAvx512},
    {Isa::kAvx512Vnni, CpuExtra::kVpopcntdq, &kBinaryAvx512Vpopcntdq},
#endif
};

// Words of one operand that a block of rows may take in the L2 cache while panels stream past it.
constexpr int64_t kBlockWords = 128 * 1024 / 8;
// Interleaved weights held at once: bounds the scratch, and leaves them in the L2 or L3 cache.
constexpr int64_t kPanelWords = 2 * 1024 * 1024 / 8;
// Word pairs (xor, count, add) below which waking another thread costs more than it saves.
constexpr int64_t kWordsWorthAThread = 1 << 15;
constexpr int kMaxTile = 8 * 64;

Status check_sizes(int64_t m, int64_t n, int64_t k) {
  if (m < 0 || n < 0 || k < 0 || k > INT32_MAX) {
    return Status::invalid("m, n, k: expected at least 0, and k below 2^31, got " + std::to_string(m) + ", " +
                           std::to_string(n) + ", " + std::to_string(k));
  }
  return {};
}

Status check_bits(const char* name, const uint64_t* bits, int64_t rows, int64_t k) {
  const int64_t words = binary_words(k);
  if (rows * words == 0) return {};
  if (bits == nullptr) return Status::invalid(std::string(name) + ": expected a pointer, got null");
  if (k % 64 == 0) return {};
  for (int64_t r = 0; r < rows; ++r) {
    if (bits[(r + 1) * words - 1] >> (k % 64) == 0) continue;
    return Status::invalid(std::string(name) + ": row " + std::to_string(r) + " has bits set beyond k = " +
                           std::to_string(k) + "; expected the tail of the last word to be zero");
  }
  return {};
}

// Row-major channels [first, first + count) -> [words][nr], missing channels zero.
void interleave(const uint64_t* b, int64_t words, int64_t count, int64_t nr, uint64_t* panel) {
  for (int64_t w = 0; w < words; ++w) {
    for (int64_t c = 0; c < nr; ++c) panel[w * nr + c] = c < count ? b[c * words + w] : 0;
  }
}

struct Product {
  const BinaryKernels* kernels;
  const uint64_t* a;
  const uint64_t* b;
  int64_t m;
  int64_t n;
  int64_t words;
};

// store(counts of a tile, its first row, its first channel, all of its TileOutput but y)
template <class Store>
void run_direct(const Product& p, const ParallelFor& parallel_for, Store&& store) {
  constexpr int64_t kChannels = 64;
  const int64_t groups = (p.n + kChannels - 1) / kChannels;
  const int64_t grain = kWordsWorthAThread / (kChannels * (p.words + 1)) + 1;
  parallel_range(parallel_for, p.m * groups, grain, [&](int64_t begin, int64_t end) {
    int32_t counts[kChannels];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / groups;
      const int64_t channel = i % groups * kChannels;
      const int channels = static_cast<int>(std::min(kChannels, p.n - channel));
      p.kernels->direct(p.a + row * p.words, p.b + channel * p.words, p.words, channels, counts);
      store(counts, row, channel, TileOutput{1, channels, channels, nullptr, p.n});
    }
  });
}

// As run_product() of the int8 family: panels of weights stream past blocks of rows.
template <class Store>
Status run_tiled(const Product& p, const ParallelFor& parallel_for, Store&& store) {
  const int64_t mr = p.kernels->size.mr;
  const int64_t nr = p.kernels->size.nr;
  const int64_t panel_words = std::max<int64_t>(1, p.words * nr);
  const int64_t panels = (p.n + nr - 1) / nr;
  const int64_t chunk = std::min(panels, std::max<int64_t>(1, kPanelWords / panel_words));
  const int64_t block_rows = even_block(p.m, std::max(mr, kBlockWords / std::max<int64_t>(1, p.words)), mr);
  const int64_t blocks = (p.m + block_rows - 1) / block_rows;
  Scratch scratch(static_cast<size_t>(chunk * panel_words) * sizeof(uint64_t));
  if (scratch.data() == nullptr) return Status::internal("out of memory for the interleaved weights");
  uint64_t* interleaved = reinterpret_cast<uint64_t*>(scratch.data());

  for (int64_t first = 0; first < panels; first += chunk) {
    const int64_t count = std::min(chunk, panels - first);
    parallel_range(parallel_for, count, kWordsWorthAThread / panel_words + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t channel = (first + i) * nr;
        interleave(p.b + channel * p.words, p.words, std::min(nr, p.n - channel), nr, interleaved + i * panel_words);
      }
    });
    const int64_t grain = kWordsWorthAThread / (std::min(p.m, block_rows) * panel_words) + 1;
    parallel_range(parallel_for, blocks * count, grain, [&](int64_t begin, int64_t end) {
      alignas(64) int32_t counts[kMaxTile];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i % count;
        const int64_t channel = (first + panel) * nr;
        const int channels = static_cast<int>(std::min(nr, p.n - channel));
        const int64_t last_row = std::min(p.m, (i / count + 1) * block_rows);
        for (int64_t row = i / count * block_rows; row < last_row; row += mr) {
          const int rows = static_cast<int>(std::min(mr, last_row - row));
          p.kernels->tile(p.a + row * p.words, p.words, rows, interleaved + panel * panel_words, p.words, counts);
          store(counts, row, channel, TileOutput{rows, static_cast<int>(nr), channels, nullptr, p.n});
        }
      }
    });
  }
  return {};
}

template <class Store>
Status run_product(const Product& p, const ParallelFor& parallel_for, Store&& store) {
  if (p.m > p.kernels->size.direct_rows) return run_tiled(p, parallel_for, store);
  run_direct(p, parallel_for, store);
  return {};
}

void pack_rows(const BinaryKernels& kernels, DType dtype, const void* x, int64_t rows, int64_t k, uint64_t* bits,
               const ParallelFor& parallel_for) {
  constexpr int64_t kElementsWorthAThread = 1 << 15;
  const auto pack_row = kernels.pack_row[static_cast<int>(dtype)];
  const size_t row_bytes = static_cast<size_t>(k) * dtype_size(dtype);
  parallel_range(parallel_for, rows, kElementsWorthAThread / (k + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      pack_row(static_cast<const char*>(x) + static_cast<size_t>(r) * row_bytes, k, bits + r * binary_words(k));
    }
  });
}

}  // namespace

Status pack_signs(DType dtype, const void* x, int64_t rows, int64_t k, uint64_t* bits,
                  const ParallelFor& parallel_for) {
  const BinaryKernels* kernels = nullptr;
  Status status = choose_kernels(kChoices, &kernels);
  if (status.ok()) status = check_sizes(rows, 0, k);
  if (!status.ok()) return status;
  if (rows * k > 0 && (x == nullptr || bits == nullptr)) return Status::invalid("x, bits: expected pointers, got null");
  pack_rows(*kernels, dtype, x, rows, k, bits, parallel_for);
  return status;
}

Status unpack_signs(const uint64_t* bits, int64_t rows, int64_t k, float* x, const ParallelFor& parallel_for) {
  Status status = check_sizes(rows, 0, k);
  if (status.ok()) status = check_bits("bits", bits, rows, k);
  if (!status.ok()) return status;
  if (rows * k > 0 && x == nullptr) return Status::invalid("x: expected a pointer, got null");
  parallel_range(parallel_for, rows, (1 << 15) / (k + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint64_t* row = bits + r * binary_words(k);
      for (int64_t i = 0; i < k; ++i) x[r * k + i] = (row[i / 64] >> (i % 64) & 1U) != 0 ? -1.0F : 1.0F;
    }
  });
  return status;
}

Status binary_matmul(const uint64_t* a_bits, const uint64_t* b_bits, int64_t m, int64_t n, int64_t k, int32_t* out,
                     const ParallelFor& parallel_for) {
  const BinaryKernels* kernels = nullptr;
  Status status = choose_kernels(kChoices, &kernels);
  if (status.ok()) status = check_sizes(m, n, k);
  if (status.ok()) status = check_bits("a_bits", a_bits, m, k);
  if (status.ok()) status = check_bits("b_bits", b_bits, n, k);
  if (!status.ok()) return status;
  if (m * n > 0 && out == nullptr) return Status::invalid("out: expected a pointer, got null");
  const BinaryEpilogue epilogue = {static_cast<int32_t>(k), nullptr, nullptr};
  return run_product(Product{kernels, a_bits, b_bits, m, n, binary_words(k)}, parallel_for,
                     [&](const int32_t* counts, int64_t row, int64_t channel, TileOutput tile) {
                       tile.y = out + row * n + channel;
                       kernels->store_int32(counts, epilogue, tile);
                     });
}

Status binary_linear(const BinaryLinear& args, const ParallelFor& parallel_for) {
  const BinaryKernels* kernels = nullptr;
  Status status = choose_kernels(kChoices, &kernels);
  if (status.ok()) status = check_sizes(args.m, args.n, args.k);
  if (status.ok()) status = check_bits("weight_bits", args.weight_bits, args.n, args.k);
  if (!status.ok()) return status;
  if (args.m * args.k > 0 && args.x == nullptr) return Status::invalid("x: expected a pointer, got null");
  if (args.m * args.n > 0 && args.y == nullptr) return Status::invalid("y: expected a pointer, got null");
  if (args.n > 0 && args.weight_scale == nullptr) return Status::invalid("weight_scale: expected a pointer, got null");
  for (int64_t c = 0; c < args.n; ++c) {
    if (std::isfinite(args.weight_scale[c])) continue;
    return Status::invalid("weight_scale: expected finite numbers, got " + format(args.weight_scale[c]) + " at index " +
                           std::to_string(c));
  }
  const int64_t words = binary_words(args.k);
  Scratch scratch(static_cast<size_t>(args.m * words) * sizeof(uint64_t));  // 1/32 of x
  if (scratch.data() == nullptr) return Status::internal("out of memory for the signs of x");
  uint64_t* bits = reinterpret_cast<uint64_t*>(scratch.data());
  pack_rows(*kernels, args.dtype, args.x, args.m, args.k, bits, parallel_for);
  const auto store_tile = kernels->store[static_cast<int>(args.dtype)];
  return run_product(Product{kernels, bits, args.weight_bits, args.m, args.n, words}, parallel_for,
                     [&](const int32_t* counts, int64_t row, int64_t channel, TileOutput tile) {
                       const BinaryEpilogue epilogue = {static_cast<int32_t>(args.k), args.weight_scale + channel,
                                                        args.bias == nullptr ? nullptr : args.bias + channel};
                       tile.y = static_cast<char*>(args.y) +
                                static_cast<size_t>(row * args.n + channel) * dtype_size(args.dtype);
                       store_tile(counts, epilogue, tile);
                     });
}

}  // namespace kdq
