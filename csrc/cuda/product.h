// Exact integer products on tensor cores: a [m, k] times b [n, k] transposed, both rows of bytes. int8 and bits differ
// in nothing but the instruction. The instructions are those of sm_80; hopper_product.h has those of sm_90a.
//
// A block computes a tile of kTile x kTile results, in steps of kStepWords words of k. While the tensor cores work on
// one step in shared memory, the next is on its way from global memory into registers. Where that makes too few blocks
// for a GPU, k is split among several: see launch_product(). Few rows have small_product.h.
#pragma once

#include "cuda/tile.h"

namespace kdq::cuda {

constexpr int kTile = 128;

// A product's members: mma, and wgmma, which is for hopper_product.h; kCounts, whether it needs count() added up over
// the words of every row of a and of b; and result(), what the sum of a piece of k, or of all of it, and these counts
// give. Results of pieces add up.

struct Int8Product {
  static constexpr bool kCounts = false;
  template <class Thread>
  static KDQ_DEVICE void mma(Thread& thread, int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    thread.mma_int8(c, a, b);
  }
  template <class Thread, class Sums>
  static KDQ_DEVICE void wgmma(Thread& thread, Sums& sums, uint64_t a, uint64_t b, bool accumulate) {
    thread.wgmma_int8(sums, a, b, accumulate);
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
  template <class Thread, class Sums>
  static KDQ_DEVICE void wgmma(Thread& thread, Sums& sums, uint64_t a, uint64_t b, bool accumulate) {
    thread.wgmma_and(sums, a, b, accumulate);
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

// Of a sum in row i and column j of a tile, whose counts are in shared memory if there are any.
template <class Thread, class Product, class Shared>
KDQ_DEVICE int32_t tile_result(Thread& thread, const Product& product, const Shared& shared, int i, int j,
                               int32_t sum) {
  if constexpr (Product::kCounts) {
    return product.result(thread, sum, shared.a_count[i], shared.b_count[j]);
  } else {
    return product.result(thread, sum, 0, 0);
  }
}

template <class Product, class Thread>
KDQ_DEVICE uint32_t count_words(Thread& thread, const Words<16>& words) {
  uint32_t sum = 0;
  for (int w = 0; w < 4; ++w) sum += Product::count(thread, words.word[w]);
  return sum;
}

// Output writes what becomes of a result. It is a template argument, so that results go there from registers. Its
// members: kBits, and if that is false
//   store(thread, row, col, result), and the parts of which Tile::store() makes it;
// or else, for results that become bits, the columns of a row side by side,
//   bit(thread, col, result), 0 for columns past the last; row_bytes; bits, [rows, row_bytes], a multiple of 8 bytes
template <class Product, class Output, class Source = Operand, class ColumnSource = Operand>
struct TiledProduct {
  using Places = Tile<kTile>;
  static constexpr int kThreads = Places::kThreads;
  static constexpr int kLoads = Places::kLoads;
  static constexpr int kRowFragments = Places::kRowFragments;
  static constexpr int kColFragments = Places::kColFragments;
  struct Shared {
    alignas(16) uint32_t a[Places::kWords];
    alignas(16) uint32_t b[Places::kWords];
    uint32_t a_count[kTile];
    uint32_t b_count[kTile];
  };

  Source a;  // tile.h says what they have
  ColumnSource b;
  Product product;
  Output output;
  int64_t splits;       // of k. The result of split s goes to row s * a.rows + row
  int64_t split_bytes;  // a multiple of a step

  int64_t tiles() const { return ceil_div(a.rows, kTile) * ceil_div(b.rows, kTile); }
  int64_t blocks() const { return tiles() * splits; }

  // The rows of which a thread loads pieces.
  struct Rows {
    typename Source::Row a[kLoads];
    typename ColumnSource::Row b[kLoads];
  };

  // What a thread carries from step to step.
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
    Rows rows;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      rows.a[i] = a.row_at(row + Places::load_row(thread, i));
      rows.b[i] = b.row_at(col + Places::load_row(thread, i));
    }
    Carried carried = {};
    load(thread, rows, begin, end, &carried);
    for (int64_t byte = begin; byte < end; byte += 4 * kStepWords) {
      put(thread, carried, shared);
      thread.sync();
      load(thread, rows, byte + 4 * kStepWords, end, &carried);
      if constexpr (ColumnSource::kPasses) {
        if (b.doubles_at(byte)) double_sums(sums);
      }
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
  static KDQ_DEVICE void double_sums(int32_t (&sums)[kRowFragments][kColFragments][4]) {
#pragma unroll
    for (int i = 0; i < kRowFragments * kColFragments * 4; ++i) {
      int32_t& sum = sums[i / (4 * kColFragments)][i / 4 % kColFragments][i % 4];
      sum = static_cast<int32_t>(2U * static_cast<uint32_t>(sum));
    }
  }

  template <class Thread>
  KDQ_DEVICE void load(Thread& thread, const Rows& rows, int64_t byte, int64_t end, Carried* carried) const {
    const int64_t at = byte + 16 * (thread.index() % kPieces);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      carried->a[i] = a.piece(thread, rows.a[i], at, end);
      carried->b[i] = b.piece(thread, rows.b[i], at, end);
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
      Places::put(thread, i, carried.a[i], shared.a);
      Places::put(thread, i, carried.b[i], shared.b);
    }
  }

  template <class Thread>
  KDQ_DEVICE void multiply(Thread& thread, const Shared& shared,
                           int32_t (&sums)[kRowFragments][kColFragments][4]) const {
#pragma unroll
    for (int step = 0; step < kStepWords; step += kFragmentWords) {
      uint32_t of_b[kColFragments][2];
#pragma unroll
      for (int c = 0; c < kColFragments; ++c) Places::get_b(thread, shared.b, c, step, of_b[c]);
#pragma unroll
      for (int r = 0; r < kRowFragments; ++r) {
        uint32_t of_a[4];
        Places::get_a(thread, shared.a, r, step, of_a);
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
      const int local = Places::load_row(thread, i);
      if (thread.index() % kPieces == 0) {
        shared.a_count[local] = of_a;
        shared.b_count[local] = of_b;
      }
    }
    thread.sync();
  }

  template <class Thread>
  KDQ_DEVICE void store(Thread& thread, int64_t first_row, int64_t row, int64_t col, const Shared& shared,
                        const int32_t (&sums)[kRowFragments][kColFragments][4]) const {
    const int rows = a.rows - row < kTile ? static_cast<int>(a.rows - row) : kTile;
    Places::store(thread, output, first_row + row, rows, col, b.rows, sums,
                  [&](int i, int j, int32_t sum) { return tile_result(thread, product, shared, i, j, sum); });
  }

  // A warp's 32 columns are one word of a row; the four lanes of a group have 8 of them each.
  template <class Thread>
  KDQ_DEVICE void store_bits(Thread& thread, int64_t row, int64_t col, const Shared& shared,
                             const int32_t (&sums)[kRowFragments][kColFragments][4]) const {
    const int64_t byte = (col + Places::warp_col(thread)) / 8;
#pragma unroll
    for (int half = 0; half < 2 * kRowFragments; ++half) {
      const int i = Places::row_of(thread, half / 2, half % 2 * 2);
      uint32_t word = 0;
#pragma unroll
      for (int c = 0; c < kColFragments; ++c) {
        for (int e = 0; e < 2; ++e) {
          const int j = Places::col_of(thread, c, e);
          const int32_t value = tile_result(thread, product, shared, i, j, sums[half / 2][c][half % 2 * 2 + e]);
          word |= output.bit(thread, col + j, value) << (j - Places::warp_col(thread));
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
