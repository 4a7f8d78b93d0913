// codebook: linear layers whose weights are indices of a few float32 centroids (weight sharing, in Han, Mao, Dally:
// Deep Compression, 2016). Kernels look the centroids up in registers, so that `bits` bits a weight are all that is
// read.
//
// Storage of the indices of an [n, k] weight, `bits` (1 to 5) each: uint32 [ceil(n / 16)][codebook_words(k, bits)][16],
// the same on every machine. With p = 32 / bits (rounded down), the index of channel c and input i is in panel c / 16,
// word i / p, lane c % 16, from bit i % p * bits on. All other bits are zero.
#pragma once

#include "kdq/parallel.h"
#include "kdq/status.h"
#include "kdq/types.h"

namespace kdq {

constexpr int kCodebookMaxBits = 5;
constexpr int64_t kCodebookLanes = 16;  // channels of a panel

constexpr int64_t codebook_panels(int64_t n) { return (n + kCodebookLanes - 1) / kCodebookLanes; }

// Words along k of a channel. bits from 1 to 5.
constexpr int64_t codebook_words(int64_t k, int bits) { return (k + 32 / bits - 1) / (32 / bits); }

// indices [n, k], below 2^bits -> packed [codebook_panels(n), codebook_words(k, bits), 16].
KDQ_API Status pack_indices(const uint8_t* indices, int64_t n, int64_t k, int bits, uint32_t* packed,
                            const ParallelFor& parallel_for);

// The inverse.
KDQ_API Status unpack_indices(const uint32_t* packed, int64_t n, int64_t k, int bits, uint8_t* indices,
                              const ParallelFor& parallel_for);

// y [m, n] = activation(x @ w.T + bias) in the dtype of x, where w[c, i] = codebook[index of c and i]. Products and
// sums are float32, a sum's in the order of k.
struct CodebookLinear {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // [m, k]
  void* y = nullptr;        // [m, n]
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  const uint32_t* packed = nullptr;  // by pack_indices()
  int bits = 0;
  const float* codebook = nullptr;  // [2^bits], finite
  const float* bias = nullptr;      // [n], or nullptr
  Activation activation = Activation::kNone;
};

// May differ between ISAs by float rounding, never between thread counts.
KDQ_API Status codebook_linear(const CodebookLinear& args, const ParallelFor& parallel_for);

}  // namespace kdq
