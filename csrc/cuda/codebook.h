// The codebook family on a GPU: packing of indices, a thread a word, and the linear layer, whose weights are looked up
// as they are read.
#pragma once

#include "core/checks.h"
#include "cuda/float_linear.h"
#include "kdq/codebook.h"

namespace kdq::cuda {

// Indices of [n, k] weights, packed.
struct IndexLayout {
  int64_t n;
  int64_t k;
  int bits;

  KDQ_DEVICE int per_word() const { return 32 / bits; }
  KDQ_DEVICE uint32_t mask() const { return (1U << bits) - 1U; }
  KDQ_DEVICE int64_t words() const { return word_of(k + per_word() - 1); }  // along k

  // i / per_word(), by constants: a division by a variable takes many instructions.
  KDQ_DEVICE int64_t word_of(int64_t i) const {
    switch (bits) {
      case 1:
        return i / 32;
      case 2:
        return i / 16;
      case 3:
        return i / 10;
      case 4:
        return i / 8;
      default:
        return i / 6;
    }
  }

  template <class Thread>
  KDQ_DEVICE uint32_t index(Thread& thread, const uint32_t* packed, int64_t col, int64_t i) const {
    const int64_t along = word_of(i);
    const int64_t word = (col / kCodebookLanes * words() + along) * kCodebookLanes + col % kCodebookLanes;
    return thread.load(packed + word) >> (static_cast<int>(i - along * per_word()) * bits) & mask();
  }
};

struct PackIndices {
  static constexpr int kThreads = 256;
  struct Shared {};

  const uint8_t* indices;
  uint32_t* packed;
  int64_t count;  // of words
  IndexLayout layout;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t own = thread.block() * kThreads + thread.index();
    if (own >= count) return;
    const int64_t along = own / kCodebookLanes % layout.words();
    const int64_t col = own / kCodebookLanes / layout.words() * kCodebookLanes + own % kCodebookLanes;
    uint32_t word = 0;
    for (int p = 0; p < layout.per_word(); ++p) {
      const int64_t i = along * layout.per_word() + p;
      if (col >= layout.n || i >= layout.k) continue;
      const uint32_t index = thread.load(indices + col * layout.k + i);
      word |= (index & layout.mask()) << (p * layout.bits);
    }
    thread.store(packed + own, word);
  }
};

struct UnpackIndices {
  static constexpr int kThreads = 256;
  struct Shared {};

  const uint32_t* packed;
  uint8_t* indices;
  IndexLayout layout;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t own = thread.block() * kThreads + thread.index();
    if (own >= layout.n * layout.k) return;
    const uint32_t index = layout.index(thread, packed, own / layout.k, own % layout.k);
    thread.store(indices + own, static_cast<uint8_t>(index));
  }
};

struct CodebookWeights {
  static constexpr int kTerms = 2;
  static constexpr bool kHasTable = true;

  // 8 indices begin in the first of these words, at index `place`, and end there or in the second: they begin at a
  // multiple of 8, which in words of 6 is index 0, 2 or 4.
  struct Piece {
    uint32_t word[2];
    int place;
  };
  struct Table {
    uint32_t terms[1 << kCodebookMaxBits];  // as two_terms() makes them, of entry / scale
    float scale;
  };

  int64_t cols;
  int64_t k;
  const uint32_t* packed;
  const float* codebook;
  IndexLayout layout;

  template <class Thread>
  KDQ_DEVICE void load(Thread& thread, int64_t col, int64_t at, float (&values)[kWeightsAtOnce]) const {
    const int per_word = layout.per_word();
    const int64_t first = layout.word_of(at);
    int place = static_cast<int>(at - first * per_word);  // of the next index in its word
    const uint32_t* next =
        packed + (col / kCodebookLanes * layout.words() + first) * kCodebookLanes + col % kCodebookLanes;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kWeightsAtOnce; ++i) {
      values[i] = 0.0F;
      if (col >= cols || at + i >= k) continue;
      if (i == 0 || place == 0) {
        word = thread.load(next) >> (place * layout.bits);
        next += kCodebookLanes;
      }
      values[i] = thread.load(codebook + (word & layout.mask()));
      word >>= layout.bits;
      place = place + 1 == per_word ? 0 : place + 1;
    }
  }

  template <class Half, class Thread>
  KDQ_DEVICE void fill(Thread& thread, Table& table) const {
    if (thread.index() >= kWarp) return;
    const int own = thread.index();
    const float entry = own < 1 << layout.bits ? thread.load(codebook + own) : 0.0F;
    const float scale = Pairs<Half>::scale_for(reduce_warp(thread, fabsf(entry), Largest()));
    table.terms[own] = two_terms<Half>(entry * scale);
    if (own == 0) table.scale = 1.0F / scale;
  }

  // Columns past the last are not stored, and indices past k, which are 0, are multiplied by x of 0.
  template <class Thread>
  KDQ_DEVICE Piece piece(Thread& thread, int64_t col, int64_t at) const {
    Piece piece = {};
    if (col >= cols || at >= k) return piece;
    const int64_t first = layout.word_of(at);
    piece.place = static_cast<int>(at - first * layout.per_word());
    const int64_t words = layout.words();
    const uint32_t* from = packed + (col / kCodebookLanes * words + first) * kCodebookLanes + col % kCodebookLanes;
    piece.word[0] = thread.load(from);
    const bool goes_on = layout.per_word() < piece.place + kPieceHalves && first + 1 < words;
    if (goes_on) piece.word[1] = thread.load(from + kCodebookLanes);
    return piece;
  }

  template <class Half>
  KDQ_DEVICE void words(const Table& table, const Piece& piece, Words<16> (&words)[kTerms]) const {
    uint32_t word = piece.word[0] >> (piece.place * layout.bits);
    const int in_first = layout.per_word() - piece.place;
    uint32_t terms[kPieceHalves];
#pragma unroll
    for (int i = 0; i < kPieceHalves; ++i) {
      if (i == in_first) word = piece.word[1];
      terms[i] = table.terms[word & layout.mask()];
      word >>= layout.bits;
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[0].word[w] = pair_lower_halves(terms[2 * w], terms[2 * w + 1]);
      words[1].word[w] = pair_upper_halves(terms[2 * w], terms[2 * w + 1]);
    }
  }

  KDQ_DEVICE float scale(const Table& table) const { return table.scale; }
};

template <class Launcher>
Status launch_pack_indices(const Launcher& launcher, const uint8_t* indices, int64_t n, int64_t k, int bits,
                           uint32_t* packed) {
  Status status = check_codebook_sizes(0, n, k, bits);
  if (status.ok()) status = check_pointer("indices", indices, n * k);
  if (status.ok()) status = check_pointer("packed", packed, n * k);
  if (!status.ok()) return status;
  const int64_t count = codebook_panels(n) * codebook_words(k, bits) * kCodebookLanes;
  const PackIndices kernel = {indices, packed, count, {n, k, bits}};
  return launcher.run(kernel, ceil_div(count, kernel.kThreads));
}

template <class Launcher>
Status launch_unpack_indices(const Launcher& launcher, const uint32_t* packed, int64_t n, int64_t k, int bits,
                             uint8_t* indices) {
  Status status = check_codebook_sizes(0, n, k, bits);
  if (status.ok()) status = check_pointer("packed", packed, n * k);
  if (status.ok()) status = check_pointer("indices", indices, n * k);
  if (!status.ok()) return status;
  const UnpackIndices kernel = {packed, indices, {n, k, bits}};
  return launcher.run(kernel, ceil_div(n * k, kernel.kThreads));
}

template <class Launcher>
Status launch_codebook_linear(const Launcher& launcher, const kdq::CodebookLinear& args) {
  Status status = check_codebook_sizes(args.m, args.n, args.k, args.bits);
  if (status.ok()) status = check_pointer("x", args.x, args.m * args.k);
  if (status.ok()) status = check_pointer("packed", args.packed, args.n * args.k);
  if (status.ok()) status = check_pointer("codebook", args.codebook, 1);
  if (status.ok()) status = check_pointer("y", args.y, args.m * args.n);
  if (!status.ok()) return status;
  const CodebookWeights weights = {args.n, args.k, args.packed, args.codebook, {args.n, args.k, args.bits}};
  const LinearOutput to = {args.y, args.dtype, args.n, nullptr, args.bias, args.activation};
  return launch_float_linear(launcher, args.x, args.m, weights, to);
}

}  // namespace kdq::cuda
