// A call of a binary product: what is the same in all of its tiles, and how it runs tile by tile. For the functions on
// plain rows (binary_gemm.cpp) and for convolutions (binary_conv2d.cpp), which differ in how rows are prepared.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <type_traits>

#include "core/binary_gemm_kernels.h"
#include "core/format.h"
#include "core/product.h"
#include "core/scratch.h"
#include "kdq/binary_gemm.h"

namespace kdq {

// The table of the ISA in force.
Status binary_kernels(const BinaryKernels** kernels);

// Interleaved weights held at once: bounds the scratch, and leaves them in the L2 or L3 cache.
constexpr int64_t kPanelBytes = 8 * 1024 * 1024;
// Word pairs (xor, count, add) below which waking another thread costs more than it saves: some 5 us of work.
constexpr int64_t kWordsWorthAThread = 1 << 17;

inline Status check_bits(const char* name, const uint64_t* bits, int64_t rows, int64_t k) {
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

inline Status check_binary_scale(const float* scale, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    if (std::isfinite(scale[c])) continue;
    return Status::invalid("weight_scale: expected finite numbers, got " + format(scale[c]) + " at index " +
                           std::to_string(c));
  }
  return {};
}

// Of a product of bit planes, in which a plane of the weights is n rows of bits after the one before.
struct BinaryPlanes {
  int of_rows;
  int of_weights;
  PlaneEpilogue epilogue;  // of channel 0; what belongs to a row comes from its memory and scale

  PlaneEpilogue epilogue_at(int64_t channel) const {
    PlaneEpilogue e = epilogue;
    e.layer.column_sum += channel;
    if (e.layer.weight_scale != nullptr) e.layer.weight_scale += channel;
    if (e.layer.bias != nullptr) e.layer.bias += channel;
    return e;
  }
};

// What is the same in every tile of a call.
struct BinaryCall {
  const BinaryKernels* kernels;
  const uint64_t* weight_bits;
  int64_t m;
  int64_t n;
  int64_t words;            // of 64 bits, of a row
  BinaryEpilogue epilogue;  // of channel 0
  Result result;
  void* y;
  const BinaryPlanes* planes = nullptr;  // or nullptr: signs

  int row_planes() const { return planes == nullptr ? 1 : planes->of_rows; }
  int weight_planes() const { return planes == nullptr ? 1 : planes->of_weights; }

  // Of one plane of a prepared row.
  int64_t plane_bytes() const { return words * 64 / kernels->size.step_bits * kernels->size.step_bytes; }

  // Where a prepared row's term of its product lies: behind its planes.
  int64_t term_at() const { return row_planes() * plane_bytes(); }

  // Where a row's bits may lie in the memory of its steps, for `spread`: at the end.
  uint64_t* bits_of(char* steps) const { return reinterpret_cast<uint64_t*>(steps + plane_bytes()) - words; }

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
struct BinaryInput {
  const char* x = nullptr;
  int64_t row_bytes = 0;

  const char* ahead(const RowTile& rows, int64_t steps, int64_t m) const {
    const int64_t from = rows.next_block * row_bytes + rows.tile_in_block * steps * kLine;
    return is_far(m * row_bytes) && from < rows.next_block_end * row_bytes ? x + from : nullptr;
  }
};

// Of rows whose dots are complete.
struct NoCorrection {};

// Few rows, row-major: their signs, or the planes of each. planes: with what belongs to rows.
void run_direct(const BinaryCall& call, const uint64_t* a, const ParallelFor& parallel_for);

// What multiplies rows by the panels of a call: what is the same in all of its tiles.
template <class Correction>
struct BinaryMultiplier {
  const BinaryCall& call;
  const BinaryInput& input;
  const PlanePasses& passes;
  int64_t steps;
  Correction correction;

  void make_panel(int64_t group, char* panel) const {
    const int nr = call.kernels->size.nr;
    const int64_t channel = group * nr;
    const int channels = static_cast<int>(std::min<int64_t>(nr, call.n - channel));
    for (int q = 0; q < call.weight_planes(); ++q) {
      call.kernels->interleave(call.weight_bits + (q * call.n + channel) * call.words, call.words, channels,
                               panel + q * call.plane_bytes() * nr);
    }
  }

  // Of one group. made: its panel, or nullptr if the first tile is to make it, in the thread's own scratch.
  auto of_group(int64_t group, const char* made) const {
    const int64_t channel = group * call.kernels->size.nr;
    const TileOutput out = call.output_at(0, 0, channel, call.kernels->size.nr);
    BinaryTileCall tile = {nullptr, 0, made, steps, call.epilogue_at(channel), out, nullptr, nullptr, &passes, nullptr};
    PlaneEpilogue planes = {};
    if (call.planes != nullptr) planes = call.planes->epilogue_at(channel);
    return [this, group, channel, made, y = static_cast<char*>(out.y), tile, planes](const RowTile& rows) mutable {
      if (made == nullptr && rows.tile_in_group == 0) make_panel(group, rows.panel);
      if (made == nullptr) tile.panel = rows.panel;
      tile.rows = rows.rows;
      tile.row_stride = rows.stride;
      tile.out.rows = rows.count;
      tile.out.y = y + rows.first * tile.out.y_stride * tile.out.element_bytes;
      tile.ahead = input.ahead(rows, steps, call.m);
      int32_t terms[kMostBinaryRows];
      if (call.planes != nullptr) {
        for (int r = 0; r < rows.count; ++r) {
          std::memcpy(terms + r, rows.rows + r * rows.stride + call.term_at(), sizeof(int32_t));
        }
        planes.row_term = terms;
        planes.row_scale = rows.scales;
        tile.planes = &planes;
      }
      const int32_t* corrections[kMostBinaryRows];
      if constexpr (!std::is_same_v<Correction, NoCorrection>) {
        tile.corrections = correction(rows.first, rows.count, corrections) ? corrections : nullptr;
        for (int r = 0; r < rows.count; ++r) {
          if (tile.corrections != nullptr && corrections[r] != nullptr) corrections[r] += channel;
        }
      }
      call.kernels->tile(tile);
    };
  }
};

// prepare(first, count, PreparedRows): the steps of rows.
// correction(first, count, to): what is subtracted from each row's dots, of all channels, or nullptr; false if nothing.
template <class Prepare, class Correction = NoCorrection>
Status run_binary_tiles(const BinaryCall& call, const BinaryInput& input, const ParallelFor& parallel_for,
                        Prepare&& prepare, Correction correction = {}) {
  const BinaryTile& size = call.kernels->size;
  const int64_t steps = call.words * 64 / size.step_bits;
  const int64_t plane_bytes = call.plane_bytes();
  const int64_t row_bytes = call.term_at() + (call.planes == nullptr ? 0 : static_cast<int64_t>(sizeof(int32_t)));
  const int64_t panel_bytes = std::max<int64_t>(sizeof(uint64_t), call.weight_planes() * plane_bytes * size.nr);
  const PlanePasses passes(call.row_planes(), call.weight_planes(), plane_bytes, plane_bytes * size.nr);
  const BinaryMultiplier<Correction> multiplier = {call, input, passes, steps, correction};
  const int64_t panels = (call.n + size.nr - 1) / size.nr;
  const int64_t row_work = size.nr * (passes.count * call.words + 1);
  ProductShape shape = {call.m, row_bytes, size.mr, panels, row_work, kWordsWorthAThread};

  // Of a single block, each panel is multiplied once, by one thread: made there, it stays in L1 or L2.
  if (rows_of_block(shape) >= call.m) {
    shape.panel_bytes = panel_bytes;
    return run_product(shape, parallel_for, prepare,
                       [&](int64_t group) { return multiplier.of_group(group, nullptr); });
  }
  const int64_t chunk = std::min(panels, std::max<int64_t>(1, kPanelBytes / panel_bytes));
  Scratch scratch(Panels::bytes(chunk, panel_bytes));
  if (scratch.data() == nullptr) return Status::internal("out of memory for the interleaved weights");
  for (int64_t first = 0; first < panels; first += chunk) {
    shape.groups = std::min(chunk, panels - first);
    Panels shared(scratch.data(), shape.groups, panel_bytes);
    Status status = run_product(shape, parallel_for, prepare, [&](int64_t group) {
      const char* panel = shared.get(group, [&](char* made) { multiplier.make_panel(first + group, made); });
      return multiplier.of_group(first + group, panel);
    });
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace kdq
