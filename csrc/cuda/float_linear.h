// Linear layers with x in floating point on a GPU: sums in float32, weights made into floats as they are read. With few
// rows reading the weights decides, and a warp computes a column; with many, a block a tile, on tensor cores
// (float_product.h) or, where a float32 is multiplied by a float32, on the float32 units. The order of a sum depends on
// the shape alone.
#pragma once

#include "cuda/float_product.h"
#include "cuda/reduce.h"

namespace kdq::cuda {

constexpr int64_t kFewRows = 16;
constexpr int kWeightsAtOnce = 16;

// Where weights come from. Members: cols, k, load(thread, col, at, values): kWeightsAtOnce weights of a column from
// `at` on, what lies outside being 0; and those of FloatProduct.
struct Int8Weights {
  static constexpr int kTerms = 1;
  static constexpr bool kHasTable = false;
  using Piece = Words<kPieceHalves>;
  struct Table {};

  int64_t cols;
  int64_t k;
  Operand weight;

  template <class Thread>
  KDQ_DEVICE void load(Thread& thread, int64_t col, int64_t at, float (&values)[kWeightsAtOnce]) const {
    const Words<16> words = weight.piece(thread, col, at, k);
#pragma unroll
    for (int i = 0; i < kWeightsAtOnce; ++i) {
      values[i] = static_cast<float>(static_cast<int8_t>(words.word[i / 4] >> (8 * (i % 4)) & 255U));
    }
  }

  template <class Thread>
  KDQ_DEVICE Piece piece(Thread& thread, int64_t col, int64_t at) const {
    return weight.piece<kPieceHalves>(thread, col, at, k);
  }

  template <class Half>
  KDQ_DEVICE void words(const Table&, const Piece& piece, Words<16> (&words)[kTerms]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t pairs[2];
      Pairs<Half>::from_int8(piece.word[i], pairs);
      words[0].word[2 * i] = pairs[0];
      words[0].word[2 * i + 1] = pairs[1];
    }
  }

  KDQ_DEVICE float scale(const Table&) const { return 1.0F; }
};

template <class T, class Weights>
struct FloatRows {
  static constexpr int kThreads = 256;
  static constexpr int kCols = kThreads / kWarp;  // of a block
  static constexpr int kRows = 4;
  static constexpr int kPiece = kWeightsAtOnce;
  struct Shared {};

  const T* x;
  int64_t rows;
  bool wide;  // rows of x are multiples of 16
  Weights weights;
  LinearOutput to;

  int64_t blocks() const { return ceil_div(weights.cols, kCols) * ceil_div(rows, kRows); }

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t k = weights.k;
    const int64_t across = (weights.cols + kCols - 1) / kCols;
    const int64_t row = thread.block() / across * kRows;
    const int64_t col = thread.block() % across * kCols + thread.index() / kWarp;
    const int lane = thread.index() % kWarp;
    if (col >= weights.cols) return;
    float sums[kRows] = {};
    for (int64_t at = int64_t{lane} * kPiece; at < k; at += kWarp * kPiece) {
      float w[kPiece];
      weights.load(thread, col, at, w);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (row + r < rows) sums[r] = add_products(thread, x + (row + r) * k + at, k - at, w, sums[r]);
      }
    }
    float own = 0.0F;  // the sum of row `lane`
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = reduce_warp(thread, sums[r], Sum());
      if (lane == r) own = sum;
    }
    if (lane < kRows && row + lane < rows) to.store(thread, row + lane, col, own, 1.0F);
  }

 private:
  template <class Thread>
  KDQ_DEVICE float add_products(Thread& thread, const T* from, int64_t left, const float (&w)[kPiece],
                                float sum) const {
#pragma unroll
    for (int c = 0; c < kPiece; c += kChunk<T>) {
      float values[kChunk<T>];
      load_chunk(thread, from + c, wide, left - c, values);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) sum = fmaf(values[e], w[c + e], sum);
    }
    return sum;
  }
};

// For float32 x.
template <class Weights>
struct FloatTile {
  static constexpr int kThreads = 256;
  static constexpr int kSide = 64;  // of the tile
  static constexpr int kOwn = 4;    // x kOwn results of a thread
  static constexpr int kStep = 32;  // of k
  static constexpr int kPitch = kSide + 4;
  struct Shared {
    alignas(16) float x[kStep][kPitch];
    alignas(16) float weight[kStep][kPitch];
  };

  const float* x;
  int64_t rows;
  bool wide;  // rows of x are multiples of 16
  Weights weights;
  LinearOutput to;

  int64_t blocks() const { return ceil_div(weights.cols, kSide) * ceil_div(rows, kSide); }

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t across = (weights.cols + kSide - 1) / kSide;
    const int64_t row = thread.block() / across * kSide;
    const int64_t col = thread.block() % across * kSide;
    const int own_row = thread.index() / (kSide / kOwn) * kOwn;
    const int own_col = thread.index() % (kSide / kOwn) * kOwn;
    float sums[kOwn][kOwn] = {};
    for (int64_t at = 0; at < weights.k; at += kStep) {
      load_x(thread, row, at, shared);
      load_weight(thread, col, at, shared);
      thread.sync();
      multiply(shared, own_row, own_col, sums);
      thread.sync();
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        if (row + own_row + i >= rows || col + own_col + j >= weights.cols) continue;
        to.store(thread, row + own_row + i, col + own_col + j, sums[i][j], 1.0F);
      }
    }
  }

 private:
  template <class Thread>
  KDQ_DEVICE void load_x(Thread& thread, int64_t row, int64_t at, Shared& shared) const {
    constexpr int kChunks = kStep / kChunk<float>;  // of a row
    for (int i = thread.index(); i < kSide * kChunks; i += kThreads) {
      const int local = i / kChunks;
      const int first = i % kChunks * kChunk<float>;
      float values[kChunk<float>] = {};
      const int64_t left = weights.k - at - first;
      if (row + local < rows) load_chunk(thread, x + (row + local) * weights.k + at + first, wide, left, values);
#pragma unroll
      for (int e = 0; e < kChunk<float>; ++e) shared.x[first + e][local] = values[e];
    }
  }

  template <class Thread>
  KDQ_DEVICE void load_weight(Thread& thread, int64_t col, int64_t at, Shared& shared) const {
    constexpr int kOfRow = kStep / kWeightsAtOnce;
    if (thread.index() >= kSide * kOfRow) return;
    const int local = thread.index() / kOfRow;
    const int first = thread.index() % kOfRow * kWeightsAtOnce;
    float values[kWeightsAtOnce];
    weights.load(thread, col + local, at + first, values);
#pragma unroll
    for (int e = 0; e < kWeightsAtOnce; ++e) shared.weight[first + e][local] = values[e];
  }

  static KDQ_DEVICE void multiply(const Shared& shared, int own_row, int own_col, float (&sums)[kOwn][kOwn]) {
#pragma unroll 8
    for (int k = 0; k < kStep; ++k) {
      float a[kOwn];
      float b[kOwn];
      memcpy(a, &shared.x[k][own_row], sizeof(a));
      memcpy(b, &shared.weight[k][own_col], sizeof(b));
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
      }
    }
  }
};

// Of a tile of float_product.h: the larger one where it leaves no multiprocessor without work.
inline int float_tile_side(int64_t m, int64_t n) {
  constexpr int64_t kBlocks = 128;
  return m > 64 && ceil_div(m, 128) * ceil_div(n, 128) >= kBlocks ? 128 : 64;
}

template <int kSide, class Y, class T, class Launcher, class Weights>
Status launch_float_product(const Launcher& launcher, const T* x, int64_t m, const Weights& weights,
                            const LinearOutput& to) {
  const FloatProduct<T, Y, Weights, kSide> kernel = {{x, m, weights.k}, m, weights, to};
  return launcher.run(kernel, kernel.blocks());
}

template <class Launcher, class Weights>
Status launch_float_linear(const Launcher& launcher, const void* x_in, int64_t m, const Weights& weights,
                           const LinearOutput& to) {
  if (m * weights.cols == 0) return {};
  return for_dtype(to.dtype, [&](auto element) {
    using T = decltype(element);
    const T* x = static_cast<const T*>(x_in);
    const bool wide = is_aligned(x, 16) && weights.k % kChunk<T> == 0;
    if (m <= kFewRows) {
      const FloatRows<T, Weights> kernel = {x, m, wide, weights, to};
      return launcher.run(kernel, kernel.blocks());
    }
    if constexpr (RowPieces<T>::kTerms > 1 && Weights::kTerms > 1) {
      const FloatTile<Weights> kernel = {x, m, wide, weights, to};
      return launcher.run(kernel, kernel.blocks());
    } else {
      return float_tile_side(m, weights.cols) == 128 ? launch_float_product<128, T>(launcher, x, m, weights, to)
                                                     : launch_float_product<64, T>(launcher, x, m, weights, to);
    }
  });
}

template <class Launcher>
Status launch_weight_only_linear(const Launcher& launcher, const Int8Linear& args) {
  if (args.m < 0 || args.n < 0 || args.k < 0) return Status::invalid("m, n, k: expected sizes of at least 0");
  const Status status = check_linear_pointers(args);
  if (!status.ok()) return status;
  const Int8Weights weights = {args.n, args.k, operand_of(args.weight, args.n, args.k)};
  return launch_float_linear(launcher, args.x, args.m, weights, linear_output(args));
}

}  // namespace kdq::cuda
