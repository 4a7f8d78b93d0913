// Exact integer products with at most kSmallRows rows of a, where reading b decides, and how products are launched.
//
// A block computes kSmallCols columns. Its warps take steps of k in turn, a step being 64 bytes of every row, and add
// up through shared memory. A lane reads 16 bytes of a row at once and hands them to mma as they are: the words of k
// are so in another order than mma's own, but in the same one for a and for b, and the sums are exact in any order.
#pragma once

#include "cuda/hopper_product.h"
#include "cuda/product.h"

namespace kdq::cuda {

constexpr int kSmallRows = 16;
constexpr int kSmallCols = 8;

template <class Product, class Output>
struct SmallProduct {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kStepBytes = 64;
  struct Shared {
    int32_t sums[kWarps][kSmallRows * kSmallCols];
    uint32_t a_count[kWarps][kSmallRows];
    uint32_t b_count[kWarps][kSmallCols];
  };

  Operand a;
  Operand b;
  Product product;
  Output output;

  int64_t blocks() const {
    if constexpr (Output::kBits) {
      return a.rows == 0 ? 0 : output.row_bytes;  // a byte is kSmallCols columns
    } else {
      return a.rows == 0 ? 0 : ceil_div(b.rows, kSmallCols);
    }
  }

  // What a lane has: rows lane / 4 and that + 8 of a, row lane / 4 of b.
  struct Own {
    int32_t sums[4];
    uint32_t a_count[2];
    uint32_t b_count;
  };

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t col = thread.block() * kSmallCols;
    Own own = {};
    if (a.unit == 16 && b.unit == 16) {
      multiply<true>(thread, col, &own);
    } else {
      multiply<false>(thread, col, &own);
    }
    share(thread, own, shared);
    thread.sync();
    if (thread.index() >= kSmallRows * kSmallCols) return;
    const int64_t row = thread.index() / kSmallCols;
    const int64_t of_row = thread.index() % kSmallCols;
    const int32_t value = result(thread, shared, thread.index() / kSmallCols, thread.index() % kSmallCols);
    if constexpr (Output::kBits) {
      uint32_t byte = output.bit(thread, col + of_row, value) << of_row;
      for (int mask = 1; mask < kSmallCols; mask *= 2) byte |= thread.shuffle_xor(byte, mask);
      if (of_row != 0 || row >= a.rows) return;
      thread.store(output.bits + row * output.row_bytes + thread.block(), static_cast<uint8_t>(byte));
    } else {
      if (row < a.rows && col + of_row < b.rows) output.store(thread, row, col + of_row, value);
    }
  }

 private:
  template <bool kWhole, class Thread>
  static KDQ_DEVICE Words<16> piece(Thread& thread, const Operand& from, int64_t row, int64_t byte) {
    if constexpr (kWhole) {
      return from.whole_piece(thread, row, byte, from.row_bytes);
    } else {
      return from.piece(thread, row, byte, from.row_bytes);
    }
  }

  template <bool kWhole, class Thread>
  KDQ_DEVICE void multiply(Thread& thread, int64_t col, Own* own) const {
    const int group = thread.index() % kWarp / 4;
    const int64_t first = int64_t{thread.index() / kWarp} * kStepBytes;
#pragma unroll(kWhole ? 4 : 1)
    for (int64_t byte = first; byte < a.row_bytes; byte += kWarps * kStepBytes) {
      const int64_t at = byte + 16 * (thread.index() % 4);
      const Words<16> of_b = piece<kWhole>(thread, b, col + group, at);
      const Words<16> top = piece<kWhole>(thread, a, group, at);
      const Words<16> bottom = piece<kWhole>(thread, a, group + 8, at);
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
        const uint32_t a_words[4] = {top.word[w], bottom.word[w], top.word[w + 1], bottom.word[w + 1]};
        const uint32_t b_words[2] = {of_b.word[w], of_b.word[w + 1]};
        Product::mma(thread, own->sums, a_words, b_words);
      }
      if constexpr (Product::kCounts) {
        own->a_count[0] += count_words<Product>(thread, top);
        own->a_count[1] += count_words<Product>(thread, bottom);
        own->b_count += count_words<Product>(thread, of_b);
      }
    }
  }

  template <class Thread>
  KDQ_DEVICE void share(Thread& thread, Own& own, Shared& shared) const {
    const int warp = thread.index() / kWarp;
    const int group = thread.index() % kWarp / 4;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      shared.sums[warp][(group + 8 * (e / 2)) * kSmallCols + 2 * (thread.index() % 4) + e % 2] = own.sums[e];
    }
    if constexpr (Product::kCounts) {
      for (int mask = 1; mask < 4; mask *= 2) {
        own.a_count[0] += thread.shuffle_xor(own.a_count[0], mask);
        own.a_count[1] += thread.shuffle_xor(own.a_count[1], mask);
        own.b_count += thread.shuffle_xor(own.b_count, mask);
      }
      if (thread.index() % 4 != 0) return;
      shared.a_count[warp][group] = own.a_count[0];
      shared.a_count[warp][group + 8] = own.a_count[1];
      shared.b_count[warp][group] = own.b_count;
    }
  }

  template <class Thread>
  KDQ_DEVICE int32_t result(Thread& thread, const Shared& shared, int row, int col) const {
    int32_t sum = 0;
    uint32_t of_a = 0;
    uint32_t of_b = 0;
    for (int w = 0; w < kWarps; ++w) {
      sum += shared.sums[w][row * kSmallCols + col];
      if constexpr (Product::kCounts) {
        of_a += shared.a_count[w][row];
        of_b += shared.b_count[w][col];
      }
    }
    return product.result(thread, sum, of_a, of_b);
  }
};

// The second stage of a product whose k was split: partial [splits, rows, cols] to results.
template <class Output>
struct AddSplits {
  static constexpr int kThreads = 256;
  struct Shared {};

  const int32_t* partial;
  int64_t splits;
  int64_t rows;
  int64_t cols;
  Output output;

  int64_t blocks() const { return ceil_div(rows * cols, kThreads); }

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t own = thread.block() * kThreads + thread.index();
    if (own >= rows * cols) return;
    uint32_t sum = 0;  // wraps where parts pass int32; the whole does not
    for (int64_t s = 0; s < splits; ++s) {
      sum += static_cast<uint32_t>(thread.load(partial + s * rows * cols + own));
    }
    output.store(thread, own / cols, own % cols, static_cast<int32_t>(sum));
  }
};

// Results as they are.
struct Int32Output {
  static constexpr bool kBits = false;
  int32_t* out;
  int64_t cols;

  template <class Thread>
  KDQ_DEVICE void store(Thread& thread, int64_t row, int64_t col, int32_t result) const {
    thread.store(out + row * cols + col, result);
  }
  template <class Thread>
  KDQ_DEVICE Nothing row(Thread&, int64_t) const {
    return {};
  }
  template <class Thread>
  KDQ_DEVICE Nothing column(Thread&, int64_t) const {
    return {};
  }
  template <class Thread>
  KDQ_DEVICE int32_t value(Thread&, Nothing, Nothing, int32_t result) const {
    return result;
  }
  template <class Body>
  KDQ_DEVICE void with_elements(const Body& body) const {
    body(out);
  }
};

// ---- for launching -------------------------------------------------------------------------------------------------

// Into how many pieces k is cut: as many as give a GPU some 128 blocks, none shorter than 1 KiB. It depends on the
// shape alone, like the workspace. The sums are exact, so that no choice changes a bit.
inline int64_t splits_of_tiles(int64_t m, int64_t n, int64_t row_bytes) {
  constexpr int64_t kBlocks = 128;
  constexpr int64_t kShortest = 1024;
  if (m == 0 || n == 0) return 1;
  const int64_t tiles = ceil_div(m, kTile) * ceil_div(n, kTile);
  const int64_t wanted = kBlocks / tiles < row_bytes / kShortest ? kBlocks / tiles : row_bytes / kShortest;
  return wanted < 1 ? 1 : wanted;
}

// The same where few rows have small_product.h.
inline int64_t splits_of(int64_t m, int64_t n, int64_t row_bytes) {
  return m <= kSmallRows ? 1 : splits_of_tiles(m, n, row_bytes);
}

// Bytes for the results of the pieces.
inline size_t bytes_of_pieces(int64_t m, int64_t n, int64_t splits) {
  return splits == 1 ? 0 : static_cast<size_t>(splits * m * n) * sizeof(int32_t);
}

// What launch_product() needs of them.
inline size_t partial_bytes(int64_t m, int64_t n, int64_t row_bytes) {
  return bytes_of_pieces(m, n, splits_of(m, n, row_bytes));
}

template <class Launcher, class Product, class Source, class Output>
Status launch_tiled(const Launcher& launcher, const Product& product, const Source& a, const Operand& b,
                    const Output& output) {
  const TiledProduct<Product, Output, Source> kernel = {a, b, product, output, 1, a.row_bytes};
  return launcher.run(kernel, kernel.blocks());
}

template <class Launcher, class Product, class Output>
Status launch_small_or_tiled(const Launcher& launcher, const Product& product, const Operand& a, const Operand& b,
                             const Output& output) {
  if (a.rows <= kSmallRows) {
    const SmallProduct<Product, Output> kernel = {a, b, product, output};
    return launcher.run(kernel, kernel.blocks());
  }
  bool use_hopper = false;
  const Status status = launcher.use_hopper(&use_hopper);
  if (!status.ok()) return status;
  if (use_hopper && fits_hopper(a, b)) return launch_hopper(launcher, product, a, b, output);
  return launch_tiled(launcher, product, a, b, output);
}

// Tiles, however few the rows. splits: pieces of k; partial: bytes_of_pieces(...), which one piece does not use.
template <class Launcher, class Product, class Source, class Output>
Status launch_tiled(const Launcher& launcher, const Product& product, const Source& a, const Operand& b,
                    const Output& output, int64_t splits, int32_t* partial) {
  if (splits == 1) return launch_tiled(launcher, product, a, b, output);
  constexpr int64_t kStepBytes = 4 * kStepWords;
  const int64_t split_bytes = ceil_div(ceil_div(a.row_bytes, splits), kStepBytes) * kStepBytes;
  const TiledProduct<Product, Int32Output, Source> first = {a, b, product, {partial, b.rows}, splits, split_bytes};
  const Status status = launcher.run(first, first.blocks());
  if (!status.ok()) return status;
  const AddSplits<Output> second = {partial, splits, a.rows, b.rows, output};
  return launcher.run(second, second.blocks());
}

// partial: partial_bytes(...), or nullptr, and k is not split.
template <class Launcher, class Product, class Output>
Status launch_product(const Launcher& launcher, const Product& product, const Operand& a, const Operand& b,
                      const Output& output, int32_t* partial) {
  const int64_t splits = partial == nullptr ? 1 : splits_of(a.rows, b.rows, a.row_bytes);
  return splits == 1 ? launch_small_or_tiled(launcher, product, a, b, output)
                     : launch_tiled(launcher, product, a, b, output, splits, partial);
}

}  // namespace kdq::cuda
