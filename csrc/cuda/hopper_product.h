// The exact integer products of product.h on Hopper's own instructions (sm_90a): wgmma, which multiplies from shared
// memory, and the copy engine, which fills it.
//
// A block has three warpgroups. One thread of the first has the copy engine bring steps of kTileRowBytes bytes of k of
// the tile's rows, as long as one of kStages stages in shared memory is empty. The two others multiply kWgmmaRows rows
// each by all of kHopperCols columns; their sums stay in registers until k is through. Two barriers a stage tell when
// it is full and when it is empty again. Blocks stay and take one tile after the other; while one tile's results are
// stored, the next one's first steps are on their way.
//
// Why 128 x 256. A tensor core takes 64 x 256 x 32 bytes in 128 cycles (a multiprocessor does 4096 products of int8 in
// one) and reads (64 + 256) * 32 bytes for it, 80 cycles' worth of shared memory at 128 bytes each; with 64 x 128 these
// are 64 and 48. So in the 256 cycles of 128 x 256 x 32 shared memory is busy for 2 * 80 cycles with reading and
// (128 + 256) * 32 / 128 = 96 with filling, 256 in all; 256 x 128 would need 4 * 48 + 96 = 288. A step is 48 KiB, so 4
// stages take 192 of the 227 KiB that a block may have. Counting what is set in rows, which bits need, reads each step
// once more, 384 cycles beside 1024; a kernel of its own that counts would need a workspace.
#pragma once

#include <string>

#include "cuda/hopper_thread.h"
#include "cuda/product.h"

namespace kdq::cuda {

constexpr int kHopperRows = 2 * kWgmmaRows;
constexpr int kHopperCols = kWgmmaCols;
constexpr int kStages = 4;
constexpr int kConsumers = 2 * kWarpgroup;  // threads that multiply

// Tiles are taken in groups of this many rows of tiles, down first. The 132 blocks of an H100 then work on
// 16 * 128 + 132 / 16 * 256 = 4160 rows and columns at a time, about the fewest, and find in L2 what another has read.
constexpr int64_t kTileGroup = 16;

struct TilePlace {
  int64_t down;
  int64_t across;
};

KDQ_HOST_DEVICE TilePlace tile_place(int64_t tile, int64_t tiles_down, int64_t tiles_across) {
  const int64_t group = tile / (kTileGroup * tiles_across);
  const int64_t first = group * kTileGroup;
  const int64_t height = tiles_down - first < kTileGroup ? tiles_down - first : kTileGroup;
  const int64_t in_group = tile - first * tiles_across;
  return {first + in_group % height, in_group / height};
}

// The stage whose turn it is, and the parity of the phase in which it is filled.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  KDQ_DEVICE void next() {
    stage = (stage + 1) % kStages;
    if (stage == 0) parity ^= 1U;
  }
};

// Product and Output are those of product.h; the product's wgmma is its mma as HopperThread has it.
template <class Product, class Output>
struct HopperProduct {
  static constexpr int kThreads = kWarpgroup + kConsumers;
  // 65536 registers are 168 for each of 384 threads, in eights; who only copies hands its own over.
  static constexpr int kCopyRegisters = 40;
  static constexpr int kMultiplyRegisters = 232;
  static_assert(kCopyRegisters + 2 * kMultiplyRegisters <= 3 * 168, "a warpgroup would wait for registers for ever");

  struct Stage {
    alignas(1024) uint8_t a[kHopperRows * kTileRowBytes];
    alignas(1024) uint8_t b[kHopperCols * kTileRowBytes];
  };
  struct Shared {
    Stage stages[kStages];
    Barrier full[kStages];
    Barrier empty[kStages];
    uint32_t a_count[kHopperRows];
    uint32_t b_count[kHopperCols];
  };

  TensorMap a;  // boxes of kHopperRows
  TensorMap b;  // boxes of kHopperCols
  int64_t rows;
  int64_t cols;
  int64_t row_bytes;
  Product product;
  Output output;

  KDQ_HOST_DEVICE int64_t tiles_down() const { return (rows + kHopperRows - 1) / kHopperRows; }
  KDQ_HOST_DEVICE int64_t tiles_across() const { return (cols + kHopperCols - 1) / kHopperCols; }
  KDQ_HOST_DEVICE int64_t tiles() const { return tiles_down() * tiles_across(); }

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    if (thread.index() == 0) {
      for (int s = 0; s < kStages; ++s) {
        thread.init(&shared.full[s], 1);
        thread.init(&shared.empty[s], kConsumers / kWarp);
      }
      thread.publish_barriers();
    }
    thread.sync();
    if (thread.index() < kWarpgroup) {
      thread.template fewer_registers<kCopyRegisters>();
      if (thread.index() == 0) copy(thread, shared);
    } else {
      thread.template more_registers<kMultiplyRegisters>();
      multiply(thread, shared);
    }
  }

 private:
  // What a thread counts.
  struct Counts {
    uint32_t of_a = 0;  // in half a row of a
    uint32_t of_b = 0;  // in a row of b
  };

  template <class Thread>
  KDQ_DEVICE void copy(Thread& thread, Shared& shared) const {
    Turn turn;
    for (int64_t tile = thread.block(); tile < tiles(); tile += thread.blocks()) {
      const TilePlace place = tile_place(tile, tiles_down(), tiles_across());
      const auto row = static_cast<int32_t>(place.down * kHopperRows);
      const auto col = static_cast<int32_t>(place.across * kHopperCols);
      for (int64_t byte = 0; byte < row_bytes; byte += kTileRowBytes) {
        Stage& stage = shared.stages[turn.stage];
        Barrier* full = &shared.full[turn.stage];
        thread.wait(&shared.empty[turn.stage], turn.parity ^ 1U);
        thread.arrive_expecting(full, sizeof(Stage));
        thread.copy_tile(stage.a, &a, static_cast<int32_t>(byte), row, full);
        thread.copy_tile(stage.b, &b, static_cast<int32_t>(byte), col, full);
        turn.next();
      }
    }
  }

  template <class Thread>
  KDQ_DEVICE void multiply(Thread& thread, Shared& shared) const {
    Turn turn;
    int32_t sums[kWgmmaSums];
    for (int64_t tile = thread.block(); tile < tiles(); tile += thread.blocks()) {
      Counts counts;
      int last = 0;
      for (int64_t byte = 0; byte < row_bytes; byte += kTileRowBytes) {
        thread.wait(&shared.full[turn.stage], turn.parity);
        multiply_step(thread, shared.stages[turn.stage], byte > 0, sums);
        if constexpr (Product::kCounts) count(thread, shared.stages[turn.stage], &counts);
        thread.wgmma_wait_for_previous();
        if (byte > 0) release(thread, &shared.empty[last]);
        last = turn.stage;
        turn.next();
      }
      thread.wgmma_finish(sums);
      release(thread, &shared.empty[last]);
      if constexpr (Product::kCounts) share(thread, counts, shared);
      const TilePlace place = tile_place(tile, tiles_down(), tiles_across());
      if constexpr (Output::kBits) {
        store_bits(thread, place, shared, sums);
      } else {
        store(thread, place, shared, sums);
      }
    }
  }

  template <class Thread>
  KDQ_DEVICE void multiply_step(Thread& thread, const Stage& stage, bool accumulate,
                                int32_t (&sums)[kWgmmaSums]) const {
    const uint64_t of_a = wgmma_operand(thread.shared_address(stage.a + first_row(thread) * kTileRowBytes));
    const uint64_t of_b = wgmma_operand(thread.shared_address(stage.b));
    thread.wgmma_fence();
#pragma unroll
    for (int byte = 0; byte < kTileRowBytes; byte += kWgmmaBytes) {
      Product::wgmma(thread, sums, of_a + byte / 16, of_b + byte / 16, accumulate || byte > 0);
    }
    thread.wgmma_commit();
  }

  // Each warp arrives when all its lanes have read what they need.
  template <class Thread>
  KDQ_DEVICE void release(Thread& thread, Barrier* empty) const {
    thread.sync_warp();
    if (thread.index() % kWarp == 0) thread.arrive(empty);
  }

  template <class Thread>
  static KDQ_DEVICE int consumer(Thread& thread) {
    return thread.index() - kWarpgroup;
  }
  // Of this warpgroup in the tile.
  template <class Thread>
  static KDQ_DEVICE int first_row(Thread& thread) {
    return consumer(thread) / kWarpgroup * kWgmmaRows;
  }

  // While the tensor cores work: a thread counts half a row of a and a row of b. The swizzle spreads the rows of
  // neighbouring threads over the banks.
  template <class Thread>
  KDQ_DEVICE void count(Thread& thread, const Stage& stage, Counts* counts) const {
    const int own = consumer(thread);
    constexpr int kHalf = kTileRowBytes / 2;
#pragma unroll
    for (int byte = 0; byte < kHalf; byte += 16) {
      counts->of_a += count_piece(thread, stage.a + swizzled(own / 2, own % 2 * kHalf + byte));
    }
#pragma unroll
    for (int byte = 0; byte < kTileRowBytes; byte += 16) {
      counts->of_b += count_piece(thread, stage.b + swizzled(own, byte));
    }
  }
  template <class Thread>
  static KDQ_DEVICE uint32_t count_piece(Thread& thread, const uint8_t* piece) {
    return count_words<Product>(thread, *reinterpret_cast<const Words<16>*>(piece));
  }

  // First everyone is done with the last tile's counts.
  template <class Thread>
  KDQ_DEVICE void share(Thread& thread, const Counts& counts, Shared& shared) const {
    const int own = consumer(thread);
    const uint32_t of_a = counts.of_a + thread.shuffle_xor(counts.of_a, 1);
    thread.template sync_some<1, kConsumers>();
    shared.a_count[own / 2] = of_a;
    shared.b_count[own] = counts.of_b;
    thread.template sync_some<1, kConsumers>();
  }

  template <class Thread>
  KDQ_DEVICE void store(Thread& thread, const TilePlace& place, const Shared& shared,
                        const int32_t (&sums)[kWgmmaSums]) const {
    const int64_t row = place.down * kHopperRows;
    const int64_t col = place.across * kHopperCols;
#pragma unroll
    for (int s = 0; s < kWgmmaSums; ++s) {
      const int i = first_row(thread) + wgmma_row(consumer(thread) % kWarpgroup, s);
      const int j = wgmma_col(consumer(thread), s);
      if (row + i >= rows || col + j >= cols) continue;
      output.store(thread, row + i, col + j, tile_result(thread, product, shared, i, j, sums[s]));
    }
  }

  // 32 columns are a word of a row; the four lanes of a group have 8 of them each.
  template <class Thread>
  KDQ_DEVICE void store_bits(Thread& thread, const TilePlace& place, const Shared& shared,
                             const int32_t (&sums)[kWgmmaSums]) const {
    const int64_t row = place.down * kHopperRows;
    const int64_t col = place.across * kHopperCols;
#pragma unroll
    for (int w = 0; w < kHopperCols / 32; ++w) {
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        const int i = first_row(thread) + wgmma_row(consumer(thread) % kWarpgroup, half);
        uint32_t word = 0;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          for (int e = 0; e < 2; ++e) {
            const int own = 16 * w + 4 * c + half + e;
            const int j = wgmma_col(consumer(thread), own);
            word |= output.bit(thread, col + j, tile_result(thread, product, shared, i, j, sums[own])) << (j - 32 * w);
          }
        }
        word |= thread.shuffle_xor(word, 1);
        word |= thread.shuffle_xor(word, 2);
        const int64_t byte = (col + 32 * w) / 8;
        if (thread.index() % 4 != 0 || row + i >= rows || byte >= output.row_bytes) continue;
        thread.store(reinterpret_cast<uint32_t*>(output.bits + (row + i) * output.row_bytes + byte), word);
      }
    }
  }
};

// ---- for launching -------------------------------------------------------------------------------------------------

// Whether launch_small_or_tiled() takes this kernel where it can, by the value of KDQ_CUDA_HOPPER (nullptr: not set).
// Not by default before it has run on a GPU: barriers that are wrong hang there, and nothing of its speed is known.
// hopper_test.cpp runs it on the emulator, and on a GPU.
constexpr bool kUseHopper = false;

inline Status parse_use_hopper(const char* value, bool* use) {
  *use = kUseHopper;
  if (value == nullptr) return {};
  const std::string text = value;
  if (text != "0" && text != "1") {
    return Status::invalid("KDQ_CUDA_HOPPER: expected 0 or 1, got '" + text + "'");
  }
  *use = text == "1";
  return {};
}

// What the copy engine can read.
inline bool fits_hopper(const Operand& a, const Operand& b) {
  const auto fits = [](const Operand& operand) {
    return operand.unit == 16 && operand.rows > 0 && operand.rows <= INT32_MAX && operand.row_bytes > 0 &&
           operand.row_bytes <= INT32_MAX;
  };
  return fits(a) && fits(b);
}

// fits_hopper(a, b), on a GPU of compute capability 9.0.
template <class Launcher, class Product, class Output>
Status launch_hopper(const Launcher& launcher, const Product& product, const Operand& a, const Operand& b,
                     const Output& output) {
  HopperProduct<Product, Output> kernel = {{}, {}, a.rows, b.rows, a.row_bytes, product, output};
  Status status = launcher.tensor_map(a, kHopperRows, &kernel.a);
  if (status.ok()) status = launcher.tensor_map(b, kHopperCols, &kernel.b);
  return status.ok() ? launcher.run_resident(kernel, kernel.tiles()) : status;
}

}  // namespace kdq::cuda
