// Exact integer products on tensor cores: a [m, k] times b [n, k] transposed, both rows of bytes. int8 and bits differ
// in nothing but the instruction, as both have the same fragments in words of 4 bytes (mma.m16n8k32 on int8,
// mma.m16n8k256 on bits: 8 words a row). The instructions are those of sm_80; wgmma is not used.
//
// A block computes a tile of kTile x kTile results, in steps of kStepWords words of k. While the tensor cores work on
// one step in shared memory, the next is on its way from global memory into registers. Where that makes too few blocks
// for a GPU, k is split among several: see launch_product(). Few rows have small_product.h.
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

  // As piece(), where unit is 16. Without its branches, loads of several pieces can be on their way at once.
  template <class Thread>
  KDQ_DEVICE Words<16> whole_piece(Thread& thread, int64_t row, int64_t byte, int64_t end) const {
    if (row >= rows || byte >= end) return {};
    return thread.load(reinterpret_cast<const Words<16>*>(data + row * row_bytes + byte));
  }

  // 16 bytes of a row from `byte` on; what lies outside is 0, and all of it where byte is not below end.
  template <class Thread>
  KDQ_DEVICE Words<16> piece(Thread& thread, int64_t row, int64_t byte, int64_t end) const {
    Words<16> words = {};
    if (unit == 16) return whole_piece(thread, row, byte, end);
    if (row >= rows || byte >= end) return words;
    const uint8_t* from = data + row * row_bytes + byte;
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

// A product's members: mma; kCounts, whether it needs count() added up over the words of every row of a and of b; and
// result(), what the sum of a piece of k, or of all of it, and these counts give. Results of pieces add up.

struct Int8Product {
  static constexpr bool kCounts = false;
  template <class Thread>
  static KDQ_DEVICE void mma(Thread& thread, int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    thread.mma_int8(c, a, b);
  }
  template <class Thread>
  KDQ_DEVICE int32_t result(Thread&, int32_t sum, uint32_t, uint32_t) const {
    return sum;
  }
};

// How many bits differ: popcount(a xor b) = popcount(a) + popcount(b) - 2 popcount(a and b).
struct BinaryProduct {
  static constexpr bool kCounts = true;
  template <class Thread>
  static KDQ_DEVICE void mma(Thread& thread, int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    thread.mma_and(c, a, b);
  }
  template <class Thread>
  static KDQ_DEVICE uint32_t count(Thread& thread, uint32_t word) {
    return static_cast<uint32_t>(thread.popcount(word));
  }
  template <class Thread>
  KDQ_DEVICE int32_t result(Thread&, int32_t both, uint32_t of_a, uint32_t of_b) const {
    return static_cast<int32_t>(of_a + of_b - 2U * static_cast<uint32_t>(both));
  }
};

template <class Product, class Thread>
KDQ_DEVICE uint32_t count_words(Thread& thread, const Words<16>& words) {
  uint32_t sum = 0;
  for (int w = 0; w < 4; ++w) sum += Product::count(thread, words.word[w]);
  return sum;
}

// Output writes what becomes of a result. It is a template argument, so that results go there from registers. Its
// members: kBits, and if that is false
//   store(thread, row, col, result)
// or else, for results that become bits, the columns of a row side by side,
//   bit(thread, col, result), 0 for columns past the last; row_bytes; bits, [rows, row_bytes], a multiple of 8 bytes
template <class Product, class Output>
struct TiledProduct {
  static constexpr int kThreads = kProductThreads;
  struct Shared {
    alignas(16) uint32_t a[kTile * kStride];
    alignas(16) uint32_t b[kTile * kStride];
    uint32_t a_count[kTile];
    uint32_t b_count[kTile];
  };

  Operand a;
  Operand b;
  Product product;
  Output output;
  int64_t splits;       // of k. The result of split s goes to row s * a.rows + row
  int64_t split_bytes;  // a multiple of a step

  int64_t tiles() const { return ceil_div(a.rows, kTile) * ceil_div(b.rows, kTile); }
  int64_t blocks() const { return tiles() * splits; }

  // What a thread carries from step to step. Its pieces are of rows index / kPieces + i * kTile / kLoads.
  struct Carried {
    Words<16> a[kLoads];
    Words<16> b[kLoads];
    uint32_t a_count[kLoads];  // over what it has loaded so far
    uint32_t b_count[kLoads];
  };

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t across = (b.rows + kTile - 1) / kTile;
    const int64_t split = thread.block() % splits;
    const int64_t tile = thread.block() / splits;
    const int64_t row = tile / across * kTile;
    const int64_t col = tile % across * kTile;
    const int64_t begin = split * split_bytes;
    const int64_t end = begin + split_bytes < a.row_bytes ? begin + split_bytes : a.row_bytes;
    int32_t sums[kRowFragments][kColFragments][4] = {};
    Carried carried = {};
    load(thread, row, col, begin, end, &carried);
    for (int64_t byte = begin; byte < end; byte += 4 * kStepWords) {
      put(thread, carried, shared);
      thread.sync();
      load(thread, row, col, byte + 4 * kStepWords, end, &carried);
      multiply(thread, shared, sums);
      thread.sync();
    }
    if constexpr (Product::kCounts) share_counts(thread, carried, shared);
    if constexpr (Output::kBits) {
      store_bits(thread, row, col, shared, sums);
    } else {
      store(thread, split * a.rows, row, col, shared, sums);
    }
  }

 private:
  template <class Thread>
  KDQ_DEVICE void load(Thread& thread, int64_t row, int64_t col, int64_t byte, int64_t end, Carried* carried) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int local = thread.index() / kPieces + i * (kTile / kLoads);
      const int64_t at = byte + 16 * (thread.index() % kPieces);
      carried->a[i] = a.piece(thread, row + local, at, end);
      carried->b[i] = b.piece(thread, col + local, at, end);
      if constexpr (Product::kCounts) {
        carried->a_count[i] += count_words<Product>(thread, carried->a[i]);
        carried->b_count[i] += count_words<Product>(thread, carried->b[i]);
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
  KDQ_DEVICE void share_counts(Thread& thread, const Carried& carried, Shared& shared) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      uint32_t of_a = carried.a_count[i];
      uint32_t of_b = carried.b_count[i];
#pragma unroll
      for (int mask = kPieces / 2; mask > 0; mask /= 2) {
        of_a += thread.shuffle_xor(of_a, mask);
        of_b += thread.shuffle_xor(of_b, mask);
      }
      const int local = thread.index() / kPieces + i * (kTile / kLoads);
      if (thread.index() % kPieces == 0) {
        shared.a_count[local] = of_a;
        shared.b_count[local] = of_b;
      }
    }
    thread.sync();
  }

  // Of result e of fragment (r, c): its row and column in the tile.
  template <class Thread>
  KDQ_DEVICE int local_row(Thread& thread, int r, int e) const {
    return warp_row(thread) + 16 * r + thread.index() % kWarp / 4 + 8 * (e / 2);
  }
  template <class Thread>
  KDQ_DEVICE int local_col(Thread& thread, int c, int e) const {
    return warp_col(thread) + 8 * c + 2 * (thread.index() % 4) + e % 2;
  }

  template <class Thread>
  KDQ_DEVICE int32_t result(Thread& thread, const Shared& shared, int i, int j, int32_t sum) const {
    if constexpr (Product::kCounts) {
      return product.result(thread, sum, shared.a_count[i], shared.b_count[j]);
    } else {
      return product.result(thread, sum, 0, 0);
    }
  }

  template <class Thread>
  KDQ_DEVICE void store(Thread& thread, int64_t first_row, int64_t row, int64_t col, const Shared& shared,
                        const int32_t (&sums)[kRowFragments][kColFragments][4]) const {
#pragma unroll
    for (int r = 0; r < kRowFragments; ++r) {
#pragma unroll
      for (int c = 0; c < kColFragments; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = local_row(thread, r, e);
          const int j = local_col(thread, c, e);
          if (row + i >= a.rows || col + j >= b.rows) continue;
          output.store(thread, first_row + row + i, col + j, result(thread, shared, i, j, sums[r][c][e]));
        }
      }
    }
  }

  // A warp's kWarpCols = 32 columns are one word of a row; the four lanes of a group have 8 of them each.
  template <class Thread>
  KDQ_DEVICE void store_bits(Thread& thread, int64_t row, int64_t col, const Shared& shared,
                             const int32_t (&sums)[kRowFragments][kColFragments][4]) const {
    const int64_t byte = (col + warp_col(thread)) / 8;
#pragma unroll
    for (int half = 0; half < 2 * kRowFragments; ++half) {
      const int i = local_row(thread, half / 2, half % 2 * 2);
      uint32_t word = 0;
#pragma unroll
      for (int c = 0; c < kColFragments; ++c) {
        for (int e = 0; e < 2; ++e) {
          const int j = local_col(thread, c, e);
          const int32_t value = result(thread, shared, i, j, sums[half / 2][c][half % 2 * 2 + e]);
          word |= output.bit(thread, col + j, value) << (j - warp_col(thread));
        }
      }
      word |= thread.shuffle_xor(word, 1);
      word |= thread.shuffle_xor(word, 2);
      if (thread.index() % 4 != 0 || row + i >= a.rows || byte >= output.row_bytes) continue;
      thread.store(reinterpret_cast<uint32_t*>(output.bits + (row + i) * output.row_bytes + byte), word);
    }
  }
};

}  // namespace kdq::cuda
