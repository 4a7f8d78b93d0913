// Public functions of the binary family: validation, interleaving of the weights, blocking, threads.
#include "kdq/binary_gemm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <string>
#include <thread>

#include "core/binary_gemm_kernels.h"
#include "core/checks.h"
#include "core/format.h"
#include "core/kernel_choice.h"
#include "core/parallel_range.h"
#include "core/product.h"
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

// Interleaved weights held at once: bounds the scratch, and leaves them in the L2 or L3 cache.
constexpr int64_t kPanelBytes = 8 * 1024 * 1024;
// Word pairs (xor, count, add) below which waking another thread costs more than it saves: some 5 us of work.
constexpr int64_t kWordsWorthAThread = 1 << 17;

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

// What is the same in every tile of a call.
struct Call {
  const BinaryKernels* kernels;
  const uint64_t* weight_bits;
  int64_t m;
  int64_t n;
  int64_t words;            // of 64 bits, of a row
  BinaryEpilogue epilogue;  // of channel 0
  Result result;
  void* y;

  BinaryEpilogue epilogue_at(int64_t channel) const {
    BinaryEpilogue e = epilogue;
    if (e.weight_scale != nullptr) e.weight_scale += channel;
    if (e.bias != nullptr) e.bias += channel;
    if (e.threshold != nullptr) e.threshold += channel;
    return e;
  }

  TileOutput output_at(int64_t row, int rows, int64_t channel, int64_t most_channels) const {
    const int element = result_bytes(result);
    const int64_t stride = result == Result::kBits ? binary_words(n) : n;
    const int64_t column = result == Result::kBits ? channel / 64 : channel;
    const Place place = place_of(y, m, stride * element);
    char* at = static_cast<char*>(y) + (row * stride + column) * element;
    return {result, element, place, rows, static_cast<int>(std::min(most_channels, n - channel)), at, stride};
  }
};

// a: bits, row-major.
void run_direct(const Call& call, const uint64_t* a, const ParallelFor& parallel_for) {
  constexpr int64_t kChannels = kDirectChannels;
  const int64_t groups = (call.n + kChannels - 1) / kChannels;
  const int64_t grain = kWordsWorthAThread / (kChannels * (call.words + 1)) + 1;
  parallel_range(parallel_for, call.m * groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / groups;
      const int64_t channel = i % groups * kChannels;
      call.kernels->direct(a + row * call.words, call.weight_bits + channel * call.words, call.words,
                           call.epilogue_at(channel), call.output_at(row, 1, channel, kChannels));
    }
  });
}

// The interleaved weights of a call, shared by its threads: whoever first comes to need a panel makes it, and others
// wait for it. Panels are so made inside the product's parallel region; one of their own would cost a second waking of
// the threads, which takes as long as a small product. A maker waits for nothing, so waiting for it ends.
class Panels {
 public:
  static size_t bytes(int64_t count, int64_t panel_bytes) {
    return static_cast<size_t>(count) * (static_cast<size_t>(panel_bytes) + sizeof(State));
  }
  Panels(char* memory, int64_t count, int64_t panel_bytes)
      : panel_bytes_(panel_bytes), panels_(memory), states_(reinterpret_cast<State*>(memory + count * panel_bytes)) {
    for (int64_t i = 0; i < count; ++i) new (states_ + i) State(kMissing);
  }

  // make(panel): writes it.
  template <class Make>
  const char* get(int64_t i, Make&& make) {
    char* panel = panels_ + i * panel_bytes_;
    State& state = states_[i];
    int seen = state.load(std::memory_order_acquire);
    if (seen == kMissing && state.compare_exchange_strong(seen, kBeingMade, std::memory_order_acquire)) {
      make(panel);
      state.store(kMade, std::memory_order_release);
      return panel;
    }
    while (state.load(std::memory_order_acquire) != kMade) std::this_thread::yield();
    return panel;
  }

 private:
  enum : int { kMissing, kBeingMade, kMade };
  using State = std::atomic<int>;

  int64_t panel_bytes_;
  char* panels_;
  State* states_;
};

// The values whose signs are packed on the way: 32 times the bytes of what is computed from them. Those of a block of
// rows are asked for while the block before is multiplied, a line at each step.
struct Input {
  const char* x = nullptr;
  int64_t row_bytes = 0;

  const char* ahead(const RowTile& rows, int64_t steps, int64_t m) const {
    const int64_t from = rows.next_block * row_bytes + rows.tile_in_block * steps * kLine;
    return is_far(m * row_bytes) && from < rows.next_block_end * row_bytes ? x + from : nullptr;
  }
};

// prepare(row, buffer): the row's steps.
template <class Prepare>
Status run_tiled(const Call& call, const Input& input, const ParallelFor& parallel_for, Prepare&& prepare) {
  const BinaryTile& size = call.kernels->size;
  const int64_t steps = call.words * 64 / size.step_bits;
  const int64_t row_bytes = steps * size.step_bytes;
  const int64_t panel_bytes = std::max<int64_t>(sizeof(uint64_t), row_bytes * size.nr);
  const int64_t panels = (call.n + size.nr - 1) / size.nr;
  const int64_t chunk = std::min(panels, std::max<int64_t>(1, kPanelBytes / panel_bytes));
  Scratch scratch(Panels::bytes(chunk, panel_bytes));
  if (scratch.data() == nullptr) return Status::internal("out of memory for the interleaved weights");

  for (int64_t first = 0; first < panels; first += chunk) {
    const int64_t count = std::min(chunk, panels - first);
    Panels shared(scratch.data(), count, panel_bytes);
    const ProductShape shape = {call.m, row_bytes, size.mr, count, size.nr * (call.words + 1), kWordsWorthAThread};
    const auto prepare_rows = [&](int64_t row, int rows, const PreparedRows& to) {
      for (int r = 0; r < rows; ++r) prepare(row + r, to.rows + r * to.stride);
    };
    Status status = run_product(shape, parallel_for, prepare_rows, [&](int64_t group) {
      const int64_t channel = (first + group) * size.nr;
      const char* panel = shared.get(group, [&](char* made) {
        const int channels = static_cast<int>(std::min<int64_t>(size.nr, call.n - channel));
        call.kernels->interleave(call.weight_bits + channel * call.words, call.words, channels, made);
      });
      const TileOutput out = call.output_at(0, 0, channel, size.nr);
      BinaryTileCall tile = {nullptr, 0, panel, steps, call.epilogue_at(channel), out, nullptr};
      return [&, y = static_cast<char*>(out.y), tile](const RowTile& rows) mutable {
        tile.rows = rows.rows;
        tile.row_stride = rows.stride;
        tile.out.rows = rows.count;
        tile.out.y = y + rows.first * tile.out.y_stride * tile.out.element_bytes;
        tile.ahead = input.ahead(rows, steps, call.m);
        call.kernels->tile(tile);
      };
    });
    if (!status.ok()) return status;
  }
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

// The rows of a product: their signs, or the values whose signs are packed on the way.
struct Rows {
  const uint64_t* bits;  // or nullptr
  DType dtype;
  const void* x;
  int64_t k;

  const char* row(int64_t r) const {
    return static_cast<const char*>(x) + static_cast<size_t>(r * k) * dtype_size(dtype);
  }
};

Status check_rows(const Rows& rows, int64_t m) {
  if (rows.bits != nullptr) return check_bits("x_bits", rows.bits, m, rows.k);
  if (m * rows.k > 0 && rows.x == nullptr) return Status::invalid("x: expected a pointer, got null");
  return {};
}

Status run_on_few_values(const Call& call, const Rows& rows, const ParallelFor& parallel_for) {
  Scratch scratch(static_cast<size_t>(call.m * call.words) * sizeof(uint64_t));
  if (scratch.data() == nullptr) return Status::internal("out of memory for the signs of x");
  uint64_t* bits = reinterpret_cast<uint64_t*>(scratch.data());
  pack_rows(*call.kernels, rows.dtype, rows.x, call.m, rows.k, bits, parallel_for);
  run_direct(call, bits, parallel_for);
  return {};
}

Status run(const Call& call, const Rows& rows, const ParallelFor& parallel_for) {
  const BinaryKernels& kernels = *call.kernels;
  const bool few = call.m <= kernels.size.direct_rows;
  if (few && rows.bits == nullptr) return run_on_few_values(call, rows, parallel_for);
  if (few) {
    run_direct(call, rows.bits, parallel_for);
    return {};
  }
  if (rows.bits != nullptr) {
    return run_tiled(call, {}, parallel_for, [&](int64_t row, char* buffer) {
      kernels.spread(rows.bits + row * call.words, call.words, buffer);
    });
  }
  const auto pack_row = kernels.pack_row[static_cast<int>(rows.dtype)];
  const Input input = {rows.row(0), rows.k * static_cast<int64_t>(dtype_size(rows.dtype))};
  const int64_t steps_bytes = call.words * 64 / kernels.size.step_bits * kernels.size.step_bytes;
  return run_tiled(call, input, parallel_for, [&](int64_t row, char* buffer) {
    uint64_t* bits = reinterpret_cast<uint64_t*>(buffer + steps_bytes) - call.words;  // the end of the buffer
    pack_row(rows.row(row), rows.k, bits);
    kernels.spread(bits, call.words, buffer);
  });
}

}  // namespace

Status pack_signs(DType dtype, const void* x, int64_t rows, int64_t k, uint64_t* bits,
                  const ParallelFor& parallel_for) {
  const BinaryKernels* kernels = nullptr;
  Status status = choose_kernels(kChoices, &kernels);
  if (status.ok()) status = check_binary_sizes(rows, 0, k);
  if (!status.ok()) return status;
  if (rows * k > 0 && (x == nullptr || bits == nullptr)) return Status::invalid("x, bits: expected pointers, got null");
  pack_rows(*kernels, dtype, x, rows, k, bits, parallel_for);
  return status;
}

Status unpack_signs(const uint64_t* bits, int64_t rows, int64_t k, float* x, const ParallelFor& parallel_for) {
  Status status = check_binary_sizes(rows, 0, k);
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
  if (status.ok()) status = check_binary_sizes(m, n, k);
  if (status.ok()) status = check_bits("a_bits", a_bits, m, k);
  if (status.ok()) status = check_bits("b_bits", b_bits, n, k);
  if (!status.ok()) return status;
  if (m * n > 0 && out == nullptr) return Status::invalid("out: expected a pointer, got null");
  const BinaryEpilogue epilogue = {static_cast<int32_t>(k), nullptr, nullptr, nullptr};
  const Call call = {kernels, b_bits, m, n, binary_words(k), epilogue, Result::kInt32, out};
  return run(call, {a_bits, DType::kFloat32, nullptr, k}, parallel_for);
}

Status binary_linear(const BinaryLinear& args, const ParallelFor& parallel_for) {
  const BinaryKernels* kernels = nullptr;
  const Rows rows = {args.x_bits, args.dtype, args.x, args.k};
  Status status = choose_kernels(kChoices, &kernels);
  if (status.ok()) status = check_binary_sizes(args.m, args.n, args.k);
  if (status.ok()) status = check_bits("weight_bits", args.weight_bits, args.n, args.k);
  if (status.ok()) status = check_rows(rows, args.m);
  if (!status.ok()) return status;
  if (args.m * args.n > 0 && args.y == nullptr) return Status::invalid("y: expected a pointer, got null");
  if (args.n > 0 && args.weight_scale == nullptr) return Status::invalid("weight_scale: expected a pointer, got null");
  for (int64_t c = 0; c < args.n; ++c) {
    if (std::isfinite(args.weight_scale[c])) continue;
    return Status::invalid("weight_scale: expected finite numbers, got " + format(args.weight_scale[c]) + " at index " +
                           std::to_string(c));
  }
  const BinaryEpilogue epilogue = {static_cast<int32_t>(args.k), args.weight_scale, args.bias, nullptr};
  const Call call = {
      kernels, args.weight_bits, args.m, args.n, binary_words(args.k), epilogue, static_cast<Result>(args.dtype),
      args.y};
  return run(call, rows, parallel_for);
}

Status binary_threshold(const BinaryThreshold& args, const ParallelFor& parallel_for) {
  const BinaryKernels* kernels = nullptr;
  const Rows rows = {args.x_bits, args.dtype, args.x, args.k};
  Status status = choose_kernels(kChoices, &kernels);
  if (status.ok()) status = check_binary_sizes(args.m, args.n, args.k);
  if (status.ok()) status = check_bits("weight_bits", args.weight_bits, args.n, args.k);
  if (status.ok()) status = check_rows(rows, args.m);
  if (!status.ok()) return status;
  if (args.m * args.n > 0 && args.y_bits == nullptr) return Status::invalid("y_bits: expected a pointer, got null");
  if (args.n > 0 && args.threshold == nullptr) return Status::invalid("threshold: expected a pointer, got null");
  const BinaryEpilogue epilogue = {static_cast<int32_t>(args.k), nullptr, nullptr, args.threshold};
  const Call call = {kernels,  args.weight_bits, args.m,     args.n, binary_words(args.k),
                     epilogue, Result::kBits,    args.y_bits};
  return run(call, rows, parallel_for);
}

}  // namespace kdq
