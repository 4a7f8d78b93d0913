// Exact integer products on tensor cores: a [m, k] times b [n, k] transposed, both rows of bytes. int8 and bits differ
// in nothing but the instruction, as both have the same fragments in words of 4 bytes (mma.m16n8k32 on int8,
// mma.m16n8k256 on bits: 8 words a row). The instructions are those of sm_80; wgmma is not used.
//
// A block computes a tile of kTile x kTile results, in steps of kStepWords words of k. While the tensor cores work on
// one step in shared memory, the next is on its way from global memory into registers.
#pragma once

#include "cuda/elements.h"

namespace kdq::cuda {

constexpr int kTile = 128;
constexpr int kStepWords = 16;           // 64 bytes of every row
constexpr int kStride = kStepWords + 4;  // of a row in shared memory: lanes of a fragment then lie in 32 banks
constexpr int kPieces = kStepWords / 4;  // of 16 bytes, of a row's step
constexpr int kFragmentWords = 8;        // of k, of one mma
constexpr int kProductThreads = 256;     // 8 warps: 2 down the tile, 4 across
constexpr int kWarpRows = kTile / 2;     // of the tile, of a warp
constexpr int kWarpCols = kTile / 4;
constexpr int kRowFragments = kWarpRows / 16;
constexpr int kColFragments = kWarpCols / 8;
constexpr int kLoads = kTile * kPieces / kProductThreads;  // pieces of a thread, of each operand

// Rows of bytes. unit: how many may be read at once: 16, 4 or 1, which divides address and row_bytes.
struct Operand {
  const uint8_t* data;
  int64_t rows;
  int64_t row_bytes;
  int unit;

  // 16 bytes of a row from `byte` on; what lies outside is 0.
  template <class Thread>
  KDQ_DEVICE Words<16> piece(Thread& thread, int64_t row, int64_t byte) const {
    Words<16> words = {};
    if (row >= rows || byte >= row_bytes) return words;
    const uint8_t* from = data + row * row_bytes + byte;
    if (unit == 16) return thread.load(reinterpret_cast<const Words<16>*>(from));
    const int64_t left = row_bytes - byte;
    if (unit == 4) {
      for (int w = 0; w < 4; ++w) {
        if (4 * w < left) words.word[w] = thread.load(reinterpret_cast<const uint32_t*>(from) + w);
      }
      return words;
    }
    for (int i = 0; i < 16; ++i) {
      if (i < left) words.word[i / 4] |= static_cast<uint32_t>(thread.load(from + i)) << (8 * (i % 4));
    }
    return words;
  }
};

inline Operand operand_of(const void* data, int64_t rows, int64_t row_bytes) {
  const auto allows = [&](int unit) { return is_aligned(data, static_cast<size_t>(unit)) && row_bytes % unit == 0; };
  return {static_cast<const uint8_t*>(data), rows, row_bytes, allows(16) ? 16 : allows(4) ? 4 : 1};
}

struct Int8Product {
  static constexpr bool kCountsBits = false;
  template <class Thread>
  static KDQ_DEVICE void mma(Thread& thread, int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    thread.mma_int8(c, a, b);
  }
};

// Counts a and b; with the bits set in each row, popcount(a xor b) = popcount(a) + popcount(b) - 2 popcount(a and b).
struct BinaryProduct {
  static constexpr bool kCountsBits = true;
  template <class Thread>
  static KDQ_DEVICE void mma(Thread& thread, int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    thread.mma_and(c, a, b);
  }
};

// Output writes what becomes of a sum. It is a template argument, so that sums go there from registers. Its member:
//   store(thread, row, col, sum, bits of the row, bits of the column), the last two 0 unless Product::kCountsBits
template <class Product, class Output>
struct TiledProduct {
  static constexpr int kThreads = kProductThreads;
  struct Shared {
    alignas(16) uint32_t a[kTile * kStride];
    alignas(16) uint32_t b[kTile * kStride];
    uint32_t a_bits[kTile];
    uint32_t b_bits[kTile];
  };

  Operand a;
  Operand b;
  Output output;

  int64_t blocks() const { return ceil_div(a.rows, kTile) * ceil_div(b.rows, kTile); }

  // What a thread carries from step to step. Its pieces are of rows index / kPieces + i * kTile / kLoads.
  struct Carried {
    Words<16> a[kLoads];
    Words<16> b[kLoads];
    uint32_t a_bits[kLoads];  // set in what it has loaded so far
    uint32_t b_bits[kLoads];
  };

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t across = (b.rows + kTile - 1) / kTile;
    const int64_t row = thread.block() / across * kTile;
    const int64_t col = thread.block() % across * kTile;
    int32_t sums[kRowFragments][kColFragments][4] = {};
    Carried carried = {};
    load(thread, row, col, 0, &carried);
    for (int64_t byte = 0; byte < a.row_bytes; byte += 4 * kStepWords) {
      put(thread, carried, shared);
      thread.sync();
      load(thread, row, col, byte + 4 * kStepWords, &carried);
      multiply(thread, shared, sums);
      thread.sync();
    }
    if constexpr (Product::kCountsBits) share_bits(thread, carried, shared);
    store(thread, row, col, shared, sums);
  }

 private:
  template <class Thread>
  KDQ_DEVICE void load(Thread& thread, int64_t row, int64_t col, int64_t byte, Carried* carried) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int local = thread.index() / kPieces + i * (kTile / kLoads);
      const int64_t at = byte + 16 * (thread.index() % kPieces);
      carried->a[i] = a.piece(thread, row + local, at);
      carried->b[i] = b.piece(thread, col + local, at);
      if constexpr (Product::kCountsBits) {
        for (int w = 0; w < 4; ++w) {
          carried->a_bits[i] += static_cast<uint32_t>(thread.popcount(carried->a[i].word[w]));
          carried->b_bits[i] += static_cast<uint32_t>(thread.popcount(carried->b[i].word[w]));
        }
      }
    }
  }

  template <class Thread>
  KDQ_DEVICE void put(Thread& thread, const Carried& carried, Shared& shared) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int local = thread.index() / kPieces + i * (kTile / kLoads);
      const int at = local * kStride + 4 * (thread.index() % kPieces);
      *reinterpret_cast<Words<16>*>(shared.a + at) = carried.a[i];
      *reinterpret_cast<Words<16>*>(shared.b + at) = carried.b[i];
    }
  }

  // First row, or column, of this warp in the tile.
  template <class Thread>
  KDQ_DEVICE int warp_row(Thread& thread) const {
    return thread.index() / kWarp / 4 * kWarpRows;
  }
  template <class Thread>
  KDQ_DEVICE int warp_col(Thread& thread) const {
    return thread.index() / kWarp % 4 * kWarpCols;
  }

  // Of the fragments, lane l has: of a, rows l / 4 and l / 4 + 8, words l % 4 and l % 4 + 4; of b, row l / 4, the same
  // words; of c, rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
  template <class Thread>
  KDQ_DEVICE void multiply(Thread& thread, const Shared& shared,
                           int32_t (&sums)[kRowFragments][kColFragments][4]) const {
    const int group = thread.index() % kWarp / 4;
    const int word = thread.index() % 4;
#pragma unroll
    for (int step = 0; step < kStepWords; step += kFragmentWords) {
      uint32_t of_b[kColFragments][2];
#pragma unroll
      for (int c = 0; c < kColFragments; ++c) {
        const uint32_t* from = shared.b + (warp_col(thread) + 8 * c + group) * kStride + step + word;
        of_b[c][0] = from[0];
        of_b[c][1] = from[4];
      }
#pragma unroll
      for (int r = 0; r < kRowFragments; ++r) {
        const uint32_t* from = shared.a + (warp_row(thread) + 16 * r + group) * kStride + step + word;
        const uint32_t of_a[4] = {from[0], from[8 * kStride], from[4], from[8 * kStride + 4]};
#pragma unroll
        for (int c = 0; c < kColFragments; ++c) Product::mma(thread, sums[r][c], of_a, of_b[c]);
      }
    }
  }

  // The kPieces threads that loaded a row add up what they counted.
  template <class Thread>
  KDQ_DEVICE void share_bits(Thread& thread, const Carried& carried, Shared& shared) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      uint32_t of_a = carried.a_bits[i];
      uint32_t of_b = carried.b_bits[i];
#pragma unroll
      for (int mask = kPieces / 2; mask > 0; mask /= 2) {
        of_a += thread.shuffle_xor(of_a, mask);
        of_b += thread.shuffle_xor(of_b, mask);
      }
      const int local = thread.index() / kPieces + i * (kTile / kLoads);
      if (thread.index() % kPieces == 0) {
        shared.a_bits[local] = of_a;
        shared.b_bits[local] = of_b;
      }
    }
    thread.sync();
  }

  template <class Thread>
  KDQ_DEVICE void store(Thread& thread, int64_t row, int64_t col, const Shared& shared,
                        const int32_t (&sums)[kRowFragments][kColFragments][4]) const {
#pragma unroll
    for (int r = 0; r < kRowFragments; ++r) {
#pragma unroll
      for (int c = 0; c < kColFragments; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = warp_row(thread) + 16 * r + thread.index() % kWarp / 4 + 8 * (e / 2);
          const int j = warp_col(thread) + 8 * c + 2 * (thread.index() % 4) + e % 2;
          if (row + i >= a.rows || col + j >= b.rows) continue;
          uint32_t row_bits = 0;
          uint32_t col_bits = 0;
          if constexpr (Product::kCountsBits) {
            row_bits = shared.a_bits[i];
            col_bits = shared.b_bits[j];
          }
          output.store(thread, row + i, col + j, sums[r][c][e], row_bits, col_bits);
        }
      }
    }
  }
};

}  // namespace kdq::cuda
