// Products of floating-point x with weights on tensor cores, in tiles (tile.h), x and weights being 16-bit floats in
// shared memory. Weights become such floats on their way there.
//
// What 16 bits do not hold is split into terms that add up to it, and each term is multiplied: a float32 x into three
// bfloat16, a float32 weight into two. Tensor cores cut sums instead of rounding them (Fasi, Higham, Mikaitis, Pranesh:
// Numerical behavior of NVIDIA tensor cores, 2021), which adds up along k. Where there are several terms, they so add
// no more than 16 elements of k at a time, and float32 additions do the rest (as Ootomo, Yokota: Recovering single
// precision accuracy from tensor cores while surpassing the FP32 theoretical peak performance, 2022).
#pragma once

#include "cuda/linear_output.h"
#include "cuda/pairs.h"
#include "cuda/tile.h"

namespace kdq::cuda {

constexpr int kPieceHalves = 8;              // elements of k in a piece
constexpr int kStepHalves = 2 * kStepWords;  // in a step

// Rows of x as pieces: kTerms; piece(thread, row, at): what is read of a row from element `at` on; words(piece, words):
// its terms.
template <class T>
struct RowPieces {
  using Half = T;
  static constexpr int kTerms = 1;
  using Piece = Words<16>;

  Operand x;

  RowPieces(const T* data, int64_t rows, int64_t k) : x(operand_of(data, rows, k * 2)) {}

  template <class Thread>
  KDQ_DEVICE Piece piece(Thread& thread, int64_t row, int64_t at) const {
    return x.piece(thread, row, 2 * at, x.row_bytes);
  }
  static KDQ_DEVICE void words(const Piece& piece, Words<16> (&words)[kTerms]) { words[0] = piece; }
};

// Three cut terms have all 24 bits of a float32 of at least 2^-110; of smaller ones they lose less than 2^-133.
template <>
struct RowPieces<float> {
  using Half = BFloat16;
  static constexpr int kTerms = 3;
  struct Piece {
    float value[kPieceHalves];
  };

  const float* x;
  int64_t rows;
  int64_t k;
  bool wide;  // rows of x are multiples of 16

  RowPieces(const float* data, int64_t m, int64_t row_length)
      : x(data), rows(m), k(row_length), wide(is_aligned(data, 16) && row_length % kChunk<float> == 0) {}

  template <class Thread>
  KDQ_DEVICE Piece piece(Thread& thread, int64_t row, int64_t at) const {
    Piece piece = {};
    if (row >= rows || at >= k) return piece;
#pragma unroll
    for (int c = 0; c < kPieceHalves; c += kChunk<float>) {
      float values[kChunk<float>];
      load_chunk(thread, x + row * k + at + c, wide, k - at - c, values);
      memcpy(piece.value + c, values, sizeof(values));
    }
    return piece;
  }

  static KDQ_DEVICE void words(const Piece& piece, Words<16> (&words)[kTerms]) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float first = piece.value[2 * w];
      float second = piece.value[2 * w + 1];
#pragma unroll
      for (int t = 0; t < kTerms; ++t) {
        words[t].word[w] = pair_upper_halves(bits_of(first), bits_of(second));
        first = rest_of(first, float_of(bits_of(first) & 0xFFFF0000U));
        second = rest_of(second, float_of(bits_of(second) & 0xFFFF0000U));
      }
    }
  }
};

// Weights has the columns as RowPieces has the rows, with words() for a Half, and a Table in shared memory, which
// fill() prepares where kHasTable; scale() is what sums are multiplied by.
//
// Y is the type of the results, whatever to.dtype says.
template <class T, class Y, class Weights, int kSide>
struct FloatProduct {
  using Rows = RowPieces<T>;
  using Half = typename Rows::Half;
  using Places = Tile<kSide>;
  static constexpr int kThreads = Places::kThreads;
  static constexpr int kLoads = Places::kLoads;
  static constexpr int kRowFragments = Places::kRowFragments;
  static constexpr int kColFragments = Places::kColFragments;
  static constexpr int kTerms = Rows::kTerms * Weights::kTerms;
  static_assert(Rows::kTerms == 1 || Weights::kTerms == 1);
  struct Shared {
    alignas(16) uint32_t x[Rows::kTerms][Places::kWords];
    alignas(16) uint32_t weight[Weights::kTerms][Places::kWords];
    typename Weights::Table table;
  };

  Rows x;
  int64_t rows;
  Weights weights;
  LinearOutput to;

  int64_t blocks() const { return ceil_div(weights.cols, kSide) * ceil_div(rows, kSide); }

  // What a thread carries from step to step.
  struct Carried {
    typename Rows::Piece x[kLoads];
    typename Weights::Piece weight[kLoads];
  };

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t across = (weights.cols + kSide - 1) / kSide;
    const int64_t row = thread.block() / across * kSide;
    const int64_t col = thread.block() % across * kSide;
    if constexpr (Weights::kHasTable) {
      weights.template fill<Half>(thread, shared.table);
      thread.sync();
    }
    float sums[kRowFragments][kColFragments][4] = {};
    Carried carried;
    load(thread, row, col, 0, &carried);
    for (int64_t at = 0; at < weights.k; at += kStepHalves) {
      put(thread, carried, shared);
      thread.sync();
      load(thread, row, col, at + kStepHalves, &carried);
      multiply(thread, shared, sums);
      thread.sync();
    }
    store(thread, row, col, weights.scale(shared.table), sums);
  }

 private:
  struct Typed : LinearOutput {
    template <class Body>
    KDQ_DEVICE void with_elements(const Body& body) const {
      body(static_cast<Y*>(y));
    }
  };

  template <class Thread>
  KDQ_DEVICE void load(Thread& thread, int64_t row, int64_t col, int64_t at, Carried* carried) const {
    const int64_t own = at + kPieceHalves * (thread.index() % kPieces);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int local = Places::load_row(thread, i);
      carried->x[i] = x.piece(thread, row + local, own);
      carried->weight[i] = weights.piece(thread, col + local, own);
    }
  }

  template <class Thread>
  KDQ_DEVICE void put(Thread& thread, const Carried& carried, Shared& shared) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      Words<16> of_x[Rows::kTerms];
      Words<16> of_weight[Weights::kTerms];
      Rows::words(carried.x[i], of_x);
      weights.template words<Half>(shared.table, carried.weight[i], of_weight);
#pragma unroll
      for (int t = 0; t < Rows::kTerms; ++t) Places::put(thread, i, of_x[t], shared.x[t]);
#pragma unroll
      for (int t = 0; t < Weights::kTerms; ++t) Places::put(thread, i, of_weight[t], shared.weight[t]);
    }
  }

  template <class Thread>
  KDQ_DEVICE void multiply(Thread& thread, const Shared& shared, float (&sums)[kRowFragments][kColFragments][4]) const {
#pragma unroll
    for (int step = 0; step < kStepWords; step += kFragmentWords) {
      uint32_t of_weight[Weights::kTerms][kColFragments][2];
#pragma unroll
      for (int t = 0; t < Weights::kTerms; ++t) {
#pragma unroll
        for (int c = 0; c < kColFragments; ++c) Places::get_b(thread, shared.weight[t], c, step, of_weight[t][c]);
      }
#pragma unroll
      for (int r = 0; r < kRowFragments; ++r) {
        uint32_t of_x[Rows::kTerms][4];
#pragma unroll
        for (int t = 0; t < Rows::kTerms; ++t) Places::get_a(thread, shared.x[t], r, step, of_x[t]);
        add_products(thread, of_x, of_weight, sums[r]);
      }
    }
  }

  // The smallest terms first. Consecutive mma are of different results, so that none waits for the one before.
  template <class Thread>
  KDQ_DEVICE void add_products(Thread& thread, const uint32_t (&of_x)[Rows::kTerms][4],
                               const uint32_t (&of_weight)[Weights::kTerms][kColFragments][2],
                               float (&sums)[kColFragments][4]) const {
    float parts[kColFragments][4] = {};
    float (&into)[kColFragments][4] = kTerms == 1 ? sums : parts;
#pragma unroll
    for (int t = kTerms - 1; t >= 0; --t) {
#pragma unroll
      for (int c = 0; c < kColFragments; ++c) {
        Pairs<Half>::mma(thread, into[c], of_x[t % Rows::kTerms], of_weight[t % Weights::kTerms][c]);
      }
    }
    if constexpr (kTerms > 1) {
#pragma unroll
      for (int c = 0; c < kColFragments; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[c][e] += parts[c][e];
      }
    }
  }

  template <class Thread>
  KDQ_DEVICE void store(Thread& thread, int64_t row, int64_t col, float scale,
                        const float (&sums)[kRowFragments][kColFragments][4]) const {
    const int left = rows - row < kSide ? static_cast<int>(rows - row) : kSide;
    Places::store(thread, Typed{to}, row, left, col, weights.cols, sums,
                  [&](int, int, float sum) { return sum * scale; });
  }
};

}  // namespace kdq::cuda
