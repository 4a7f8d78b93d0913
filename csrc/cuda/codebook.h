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
  KDQ_DEVICE int64_t words() const { return (k + per_word() - 1) / per_word(); }  // along k

  template <class Thread>
  KDQ_DEVICE uint32_t index(Thread& thread, const uint32_t* packed, int64_t col, int64_t i) const {
    const int64_t word = (col / kCodebookLanes * words() + i / per_word()) * kCodebookLanes + col % kCodebookLanes;
    return thread.load(packed + word) >> (static_cast<int>(i % per_word()) * bits) & mask();
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
  int64_t cols;
  int64_t k;
  const uint32_t* packed;
  const float* codebook;
  IndexLayout layout;

  template <class Thread>
  KDQ_DEVICE void load(Thread& thread, int64_t col, int64_t at, float (&values)[kWeightsAtOnce]) const {
    const int per_word = layout.per_word();
    int place = static_cast<int>(at % per_word);  // of the next index in its word
    const uint32_t* next =
        packed + (col / kCodebookLanes * layout.words() + at / per_word) * kCodebookLanes + col % kCodebookLanes;
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
