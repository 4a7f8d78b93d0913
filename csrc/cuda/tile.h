// The tile of results that a block of a product on tensor cores computes: rows of operands as they are read, where they
// lie in shared memory, and what of them and of the results a lane has.
//
// int8, bits and 16-bit floats have the same fragments in words of 4 bytes (mma.m16n8k32 on int8, mma.m16n8k256 on
// bits, mma.m16n8k16 on floats: 8 words a row). A block works in steps of kStepWords words of every row.
#pragma once

#include "cuda/elements.h"

namespace kdq::cuda {

constexpr int kStepWords = 16;           // 64 bytes of every row
constexpr int kStride = kStepWords + 4;  // of a row in shared memory: lanes of a fragment then lie in 32 banks
constexpr int kPieces = kStepWords / 4;  // of 16 bytes, of a row's step
constexpr int kFragmentWords = 8;        // of k, of one mma

// Rows of bytes. unit: how many may be read at once: 16, 4 or 1, which divides address and row_bytes.
//
// For the rows of a, a tiled product takes any source with rows, row_bytes, Row, row_at() and piece(): windows.h
// has another. So has bitplanes.h, for those of b too: kPasses says that doubles_at() has something to say.
struct Operand {
  static constexpr bool kPasses = false;
  const uint8_t* data;
  int64_t rows;
  int64_t row_bytes;
  int unit;

  // What a thread finds out about a row before it goes along it: here nothing.
  using Row = int64_t;
  KDQ_DEVICE Row row_at(int64_t row) const { return row; }

  // As piece(), where unit is 16. Without its branches, loads of several pieces can be on their way at once.
  template <int kBytes = 16, class Thread>
  KDQ_DEVICE Words<kBytes> whole_piece(Thread& thread, int64_t row, int64_t byte, int64_t end) const {
    if (row >= rows || byte >= end) return {};
    return thread.load(reinterpret_cast<const Words<kBytes>*>(data + row * row_bytes + byte));
  }

  // kBytes of a row from `byte` on; what lies outside is 0, and all of it where byte is not below end.
  template <int kBytes = 16, class Thread>
  KDQ_DEVICE Words<kBytes> piece(Thread& thread, int64_t row, int64_t byte, int64_t end) const {
    Words<kBytes> words = {};
    if (unit == 16) return whole_piece<kBytes>(thread, row, byte, end);
    if (row >= rows || byte >= end) return words;
    const uint8_t* from = data + row * row_bytes + byte;
    const int64_t left = row_bytes - byte;
    if (unit == 4) {
      for (int w = 0; w < kBytes / 4; ++w) {
        if (4 * w < left) words.word[w] = thread.load(reinterpret_cast<const uint32_t*>(from) + w);
      }
      return words;
    }
    for (int i = 0; i < kBytes; ++i) {
      if (i < left) words.word[i / 4] |= static_cast<uint32_t>(thread.load(from + i)) << (8 * (i % 4));
    }
    return words;
  }
};

inline Operand operand_of(const void* data, int64_t rows, int64_t row_bytes) {
  const auto allows = [&](int unit) { return is_aligned(data, static_cast<size_t>(unit)) && row_bytes % unit == 0; };
  return {static_cast<const uint8_t*>(data), rows, row_bytes, allows(16) ? 16 : allows(4) ? 4 : 1};
}

// What an output reads for a row or a column of which it needs nothing.
struct Nothing {};

// A tile of kSide x kSide results.
template <int kSide>
struct Tile {
  static constexpr int kThreads = 256;  // 8 warps: 2 down the tile, 4 across
  static constexpr int kWarpRows = kSide / 2;
  static constexpr int kWarpCols = kSide / 4;
  static constexpr int kRowFragments = kWarpRows / 16;
  static constexpr int kColFragments = kWarpCols / 8;
  static constexpr int kLoads = kSide * kPieces / kThreads;  // pieces of a thread, of each operand
  static constexpr int kWords = kSide * kStride;             // of an operand in shared memory

  // Row of the tile of which a thread loads its piece i.
  template <class Thread>
  static KDQ_DEVICE int load_row(Thread& thread, int i) {
    return thread.index() / kPieces + i * (kSide / kLoads);
  }

  template <class Thread>
  static KDQ_DEVICE void put(Thread& thread, int i, const Words<16>& piece, uint32_t (&shared)[kWords]) {
    *reinterpret_cast<Words<16>*>(shared + load_row(thread, i) * kStride + 4 * (thread.index() % kPieces)) = piece;
  }

  // First row, or column, of this warp in the tile.
  template <class Thread>
  static KDQ_DEVICE int warp_row(Thread& thread) {
    return thread.index() / kWarp / 4 * kWarpRows;
  }
  template <class Thread>
  static KDQ_DEVICE int warp_col(Thread& thread) {
    return thread.index() / kWarp % 4 * kWarpCols;
  }

  // Of the fragments, lane l has: of a, rows l / 4 and l / 4 + 8, words l % 4 and l % 4 + 4; of b, row l / 4, the same
  // words; of c, rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next. `step`: the first word.
  template <class Thread>
  static KDQ_DEVICE void get_a(Thread& thread, const uint32_t (&shared)[kWords], int r, int step, uint32_t (&a)[4]) {
    const int row = warp_row(thread) + 16 * r + thread.index() % kWarp / 4;
    const uint32_t* from = shared + row * kStride + step + thread.index() % 4;
    a[0] = from[0];
    a[1] = from[8 * kStride];
    a[2] = from[4];
    a[3] = from[8 * kStride + 4];
  }
  template <class Thread>
  static KDQ_DEVICE void get_b(Thread& thread, const uint32_t (&shared)[kWords], int c, int step, uint32_t (&b)[2]) {
    const int row = warp_col(thread) + 8 * c + thread.index() % kWarp / 4;
    const uint32_t* from = shared + row * kStride + step + thread.index() % 4;
    b[0] = from[0];
    b[1] = from[4];
  }

  // Of result e of fragment (r, c): its row and column in the tile.
  template <class Thread>
  static KDQ_DEVICE int row_of(Thread& thread, int r, int e) {
    return warp_row(thread) + 16 * r + thread.index() % kWarp / 4 + 8 * (e / 2);
  }
  template <class Thread>
  static KDQ_DEVICE int col_of(Thread& thread, int c, int e) {
    return warp_col(thread) + 8 * c + 2 * (thread.index() % 4) + e % 2;
  }

  // Writes a lane's results, those of two neighbouring columns at once where the output's rows allow that. They are
  //   output.value(thread, output.row(thread, row), output.column(thread, col), result(i, j, sum))
  // where row() and column() read from memory what the results of a row or of a column share, and i, j is the place in
  // the tile. It has `rows` rows from `row` on, and columns from col on; those past the last of `cols` are not written.
  // with_elements(body) calls body with a pointer to the output's elements, of their type.
  template <class Thread, class Output, class Sum, class Result>
  static KDQ_DEVICE void store(Thread& thread, const Output& output, int64_t row, int rows, int64_t col, int64_t cols,
                               const Sum (&sums)[kRowFragments][kColFragments][4], const Result& result) {
    decltype(output.column(thread, col)) of_columns[kColFragments][2];
#pragma unroll
    for (int c = 0; c < kColFragments; ++c) {
      for (int e = 0; e < 2; ++e) of_columns[c][e] = output.column(thread, col + col_of(thread, c, e));
    }
    output.with_elements([&](auto* y) {
      const bool wide = cols % 2 == 0 && reinterpret_cast<uintptr_t>(y) % (2 * sizeof(*y)) == 0;
#pragma unroll
      for (int half = 0; half < 2 * kRowFragments; ++half) {
        const int first = half % 2 * 2;  // of the fragment's results
        const int i = row_of(thread, half / 2, first);
        if (i >= rows) continue;
        const auto of_row = output.row(thread, row + i);
#pragma unroll
        for (int c = 0; c < kColFragments; ++c) {
          const int j = col_of(thread, c, 0);
          const Sum(&own)[4] = sums[half / 2][c];
          store_pair(thread, y + (row + i) * cols + col + j, wide, cols - (col + j),
                     output.value(thread, of_row, of_columns[c][0], result(i, j, own[first])),
                     output.value(thread, of_row, of_columns[c][1], result(i, j + 1, own[first + 1])));
        }
      }
    });
  }

 private:
  // wide: left is even, and y a multiple of two elements.
  template <class Thread, class T, class Value>
  static KDQ_DEVICE void store_pair(Thread& thread, T* y, bool wide, int64_t left, Value first, Value second) {
    if (left <= 0) return;
    using Bits = typename Element<T>::Bits;
    const Bits bits[2] = {Element<T>::narrow(first), Element<T>::narrow(second)};
    Bits* to = reinterpret_cast<Bits*>(y);
    if (wide) {
      Words<sizeof(bits)> words;
      memcpy(&words, bits, sizeof(bits));
      thread.store(reinterpret_cast<Words<sizeof(bits)>*>(to), words);
    } else {
      thread.store(to, bits[0]);
      if (left > 1) thread.store(to + 1, bits[1]);
    }
  }
};

}  // namespace kdq::cuda
