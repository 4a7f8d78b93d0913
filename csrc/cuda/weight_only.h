// int8_weight_only_linear on a GPU: products and sums in float32, weights widened as they are read. With few rows
// reading the weights decides, and a warp computes a column; with many, a block a tile, on the float32 units and not on
// tensor cores. The order of a sum depends on the shape alone.
#pragma once

#include "cuda/linear_output.h"
#include "cuda/product.h"
#include "cuda/reduce.h"

namespace kdq::cuda {

constexpr int64_t kFewRows = 16;

// 16 weights as floats.
KDQ_DEVICE void widen_weights(const Words<16>& words, float (&values)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    values[i] = static_cast<float>(static_cast<int8_t>(words.word[i / 4] >> (8 * (i % 4)) & 255U));
  }
}

template <class T>
struct WeightOnlyRows {
  static constexpr int kThreads = 256;
  static constexpr int kCols = kThreads / kWarp;  // of a block
  static constexpr int kRows = 4;
  static constexpr int kPiece = 16;  // of k, that a lane reads at once
  struct Shared {};

  const T* x;
  int64_t rows;
  bool wide;  // rows of x are multiples of 16
  Operand weight;
  LinearOutput to;

  int64_t blocks() const { return ceil_div(weight.rows, kCols) * ceil_div(rows, kRows); }

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t k = weight.row_bytes;
    const int64_t across = (weight.rows + kCols - 1) / kCols;
    const int64_t row = thread.block() / across * kRows;
    const int64_t col = thread.block() % across * kCols + thread.index() / kWarp;
    const int lane = thread.index() % kWarp;
    if (col >= weight.rows) return;
    float sums[kRows] = {};
    for (int64_t at = int64_t{lane} * kPiece; at < k; at += kWarp * kPiece) {
      float w[kPiece];
      widen_weights(weight.piece(thread, col, at, k), w);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (row + r < rows) sums[r] = add_products(thread, x + (row + r) * k + at, k - at, w, sums[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = reduce_warp(thread, sums[r], Sum());
      if (lane == r && row + r < rows) to.store(thread, row + r, col, sum, 1.0F);
    }
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

template <class T>
struct WeightOnlyTile {
  static constexpr int kThreads = 256;
  static constexpr int kSide = 64;  // of the tile
  static constexpr int kOwn = 4;    // x kOwn results of a thread
  static constexpr int kStep = 32;  // of k
  static constexpr int kPitch = kSide + 4;
  struct Shared {
    alignas(16) float x[kStep][kPitch];
    alignas(16) float weight[kStep][kPitch];
  };

  const T* x;
  int64_t rows;
  bool wide;  // rows of x are multiples of 16
  Operand weight;
  LinearOutput to;

  int64_t blocks() const { return ceil_div(weight.rows, kSide) * ceil_div(rows, kSide); }

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t across = (weight.rows + kSide - 1) / kSide;
    const int64_t row = thread.block() / across * kSide;
    const int64_t col = thread.block() % across * kSide;
    const int own_row = thread.index() / (kSide / kOwn) * kOwn;
    const int own_col = thread.index() % (kSide / kOwn) * kOwn;
    float sums[kOwn][kOwn] = {};
    for (int64_t at = 0; at < weight.row_bytes; at += kStep) {
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
        if (row + own_row + i >= rows || col + own_col + j >= weight.rows) continue;
        to.store(thread, row + own_row + i, col + own_col + j, sums[i][j], 1.0F);
      }
    }
  }

 private:
  template <class Thread>
  KDQ_DEVICE void load_x(Thread& thread, int64_t row, int64_t at, Shared& shared) const {
    constexpr int kChunks = kStep / kChunk<T>;  // of a row
    for (int i = thread.index(); i < kSide * kChunks; i += kThreads) {
      const int local = i / kChunks;
      const int first = i % kChunks * kChunk<T>;
      float values[kChunk<T>] = {};
      const int64_t left = weight.row_bytes - at - first;
      if (row + local < rows) load_chunk(thread, x + (row + local) * weight.row_bytes + at + first, wide, left, values);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) shared.x[first + e][local] = values[e];
    }
  }

  template <class Thread>
  KDQ_DEVICE void load_weight(Thread& thread, int64_t col, int64_t at, Shared& shared) const {
    constexpr int kOfRow = kStep / 16;  // of a row
    if (thread.index() >= kSide * kOfRow) return;
    const int local = thread.index() / kOfRow;
    const int first = thread.index() % kOfRow * 16;
    float values[16];
    widen_weights(weight.piece(thread, col + local, at + first, weight.row_bytes), values);
#pragma unroll
    for (int e = 0; e < 16; ++e) shared.weight[first + e][local] = values[e];
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

template <class Launcher>
Status launch_weight_only_linear(const Launcher& launcher, const Int8Linear& args) {
  if (args.m < 0 || args.n < 0 || args.k < 0) return Status::invalid("m, n, k: expected sizes of at least 0");
  const Status status = check_linear_pointers(args);
  if (!status.ok() || args.m * args.n == 0) return status;
  return for_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const T* x = static_cast<const T*>(args.x);
    const bool wide = is_aligned(x, 16) && args.k % kChunk<T> == 0;
    const Operand weight = operand_of(args.weight, args.n, args.k);
    if (args.m <= kFewRows) {
      const WeightOnlyRows<T> kernel = {x, args.m, wide, weight, linear_output(args)};
      return launcher.run(kernel, kernel.blocks());
    }
    const WeightOnlyTile<T> kernel = {x, args.m, wide, weight, linear_output(args)};
    return launcher.run(kernel, kernel.blocks());
  });
}

}  // namespace kdq::cuda
