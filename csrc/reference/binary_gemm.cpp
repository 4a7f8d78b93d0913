// The specification of the binary family: bits one at a time. Its tile is one row and one word of channels.
#include <cstring>

#include "core/binary_gemm_kernels.h"
#include "reference/scalar.h"

namespace kdq {
namespace {

int64_t differing_bits(const uint64_t* a, const uint64_t* b, int64_t words) {
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w) {
    for (uint64_t different = a[w] ^ b[w]; different != 0; different >>= 1)
      count += static_cast<int64_t>(different & 1);
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

  // Not interleaved: the channels as they are.
  static void interleave(const uint64_t* b, int64_t words, int channels, char* panel) {
    std::memcpy(panel, b, static_cast<size_t>(channels * words) * sizeof(uint64_t));
  }

  static void spread(const uint64_t* bits, int64_t words, char* steps) {
    std::memmove(steps, bits, static_cast<size_t>(words) * sizeof(uint64_t));
  }

  static void tile(const BinaryTileCall& call) {
    product(reinterpret_cast<const uint64_t*>(call.rows), reinterpret_cast<const uint64_t*>(call.panel), call.steps,
            call.epilogue, call.out, call.corrections == nullptr ? nullptr : call.corrections[0]);
  }

  static void direct(const uint64_t* a, const uint64_t* b, int64_t words, const BinaryEpilogue& e,
                     const TileOutput& out) {
    product(a, b, words, e, out, nullptr);
  }

  static void product(const uint64_t* a, const uint64_t* b, int64_t words, const BinaryEpilogue& e,
                      const TileOutput& out, const int32_t* correction) {
    if (out.type == Result::kBits) std::memset(out.y, 0, static_cast<size_t>(out.cols + 63) / 64 * sizeof(uint64_t));
    for (int c = 0; c < out.cols; ++c) {
      const auto all = static_cast<int32_t>(e.k - 2 * differing_bits(a, b + c * words, words));
      const int32_t dot = all - (correction == nullptr ? 0 : correction[c]);
      if (out.type == Result::kInt32) {
        static_cast<int32_t*>(out.y)[c] = dot;
      } else if (out.type == Result::kBits) {
        static_cast<uint64_t*>(out.y)[c / 64] |= static_cast<uint64_t>(dot < e.threshold[c]) << (c % 64);
      } else {
        const float scaled = static_cast<float>(dot) * e.weight_scale[c];
        reference::store_as(out.type, out.y, c, scaled + (e.bias == nullptr ? 0.0F : e.bias[c]));
      }
    }
  }
};

}  // namespace

const BinaryKernels kBinaryReference = make_binary_kernels<Loops>({1, 64, 64, 8, 0});

}  // namespace kdq
