// The specification of the binary family: bits one at a time. Its tile is one row and one channel.
#include "core/binary_gemm_kernels.h"
#include "reference/scalar.h"

namespace kdq {
namespace {

int differing_bits(const uint64_t* a, const uint64_t* b, int64_t words) {
  int count = 0;
  for (int64_t w = 0; w < words; ++w) {
    for (uint64_t different = a[w] ^ b[w]; different != 0; different >>= 1) count += static_cast<int>(different & 1);
  }
  return count;
}

struct Loops {
  template <class T>
  static void pack_row(const void* x, int64_t k, uint64_t* bits) {
    for (int64_t w = 0; w < (k + 63) / 64; ++w) bits[w] = 0;
    for (int64_t i = 0; i < k; ++i) {
      const bool negative = reference::load(static_cast<const T*>(x) + i) < 0.0F;
      bits[i / 64] |= static_cast<uint64_t>(negative) << (i % 64);
    }
  }

  static void tile(const uint64_t* a, int64_t, int, const uint64_t* panel, int64_t words, int32_t* counts) {
    *counts = differing_bits(a, panel, words);
  }

  static void direct(const uint64_t* a, const uint64_t* b, int64_t words, int channels, int32_t* counts) {
    for (int c = 0; c < channels; ++c) counts[c] = differing_bits(a, b + c * words, words);
  }

  static void store_int32(const int32_t* counts, const BinaryEpilogue& e, int cols, int32_t* y) {
    for (int c = 0; c < cols; ++c) y[c] = e.k - 2 * counts[c];
  }

  template <class T>
  static void store_linear(const int32_t* counts, const BinaryEpilogue& e, int cols, void* y) {
    for (int c = 0; c < cols; ++c) {
      const float scaled = static_cast<float>(e.k - 2 * counts[c]) * e.weight_scale[c];
      reference::store(static_cast<T*>(y) + c, scaled + (e.bias == nullptr ? 0.0F : e.bias[c]));
    }
  }
};

}  // namespace

const BinaryKernels kBinaryReference = make_binary_kernels<Loops>({1, 1, 0});

}  // namespace kdq
