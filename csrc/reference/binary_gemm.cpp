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

  // body(index in y, c, k - 2 * count) for all that is wanted of a tile.
  template <class Body>
  static void for_each_dot(const int32_t* counts, const BinaryEpilogue& e, const TileOutput& out, Body body) {
    for (int r = 0; r < out.rows; ++r) {
      for (int c = 0; c < out.cols; ++c) body(r * out.y_stride + c, c, e.k - 2 * counts[r * out.width + c]);
    }
  }

  static void store_int32(const int32_t* counts, const BinaryEpilogue& e, const TileOutput& out) {
    for_each_dot(counts, e, out, [&](int64_t i, int, int32_t dot) { static_cast<int32_t*>(out.y)[i] = dot; });
  }

  template <class T>
  static void store_linear(const int32_t* counts, const BinaryEpilogue& e, const TileOutput& out) {
    for_each_dot(counts, e, out, [&](int64_t i, int c, int32_t dot) {
      const float scaled = static_cast<float>(dot) * e.weight_scale[c];
      reference::store(static_cast<T*>(out.y) + i, scaled + (e.bias == nullptr ? 0.0F : e.bias[c]));
    });
  }
};

}  // namespace

const BinaryKernels kBinaryReference = make_binary_kernels<Loops>({1, 1, 0});

}  // namespace kdq
