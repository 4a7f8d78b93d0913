// The specification of the binary family: bits one at a time. Its tile is one row and one word of channels.
#include <cstring>

#include "core/binary_gemm_kernels.h"
#include "reference/int8_epilogue.h"
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

  template <class T>
  static PlaneRow pack_planes(const PlaneRowCall& call) {
    PlaneRow row = {0, false};
    const int64_t words = (call.k + 63) / 64;
    for (int p = 0; p < call.bits; ++p) {
      for (int64_t w = 0; w < words; ++w) call.planes[p * call.stride + w] = 0;
    }
    for (int64_t i = 0; i < call.k; ++i) {
      const float value = reference::load(static_cast<const T*>(call.x) + i);
      const int32_t q = reference::quantize(value, call.grid);
      row.has_nan = row.has_nan || std::isnan(value);
      row.sum += q;
      for (int p = 0; p < call.bits; ++p) {
        call.planes[p * call.stride + i / 64] |= static_cast<uint64_t>(q >> p & 1) << (i % 64);
      }
    }
    return row;
  }

  // Not interleaved: the channels as they are.
  static void interleave(const uint64_t* b, int64_t words, int channels, char* panel) {
    std::memcpy(panel, b, static_cast<size_t>(channels * words) * sizeof(uint64_t));
  }

  static void spread(const uint64_t* bits, int64_t words, char* steps) {
    std::memmove(steps, bits, static_cast<size_t>(words) * sizeof(uint64_t));
  }

  static void tile(const BinaryTileCall& call) {
    product({reinterpret_cast<const uint64_t*>(call.rows), reinterpret_cast<const uint64_t*>(call.panel), call.steps,
             call.epilogue, call.out, call.passes, call.planes},
            call.corrections == nullptr ? nullptr : call.corrections[0]);
  }

  static void direct(const BinaryDirectCall& call) { product(call, nullptr); }

  // Over the passes, modulo 2^32.
  static uint32_t differing_bits(const BinaryDirectCall& call, int c) {
    uint32_t count = 0;
    for (int i = 0; i < call.passes->count; ++i) {
      const PlanePass& pass = call.passes->at[i];
      const uint64_t* a = call.a + pass.rows / 8;
      const uint64_t* b = call.b + pass.weights / 8 + c * call.words;
      if (pass.doubles) count *= 2;
      count += static_cast<uint32_t>(kdq::differing_bits(a, b, call.words));
    }
    return count;
  }

  static void product(const BinaryDirectCall& call, const int32_t* correction) {
    if (call.planes != nullptr) return plane_product(call, *call.planes);
    const BinaryEpilogue& e = call.epilogue;
    const TileOutput& out = call.out;
    if (out.type == Result::kBits) std::memset(out.y, 0, static_cast<size_t>(out.cols + 63) / 64 * sizeof(uint64_t));
    for (int c = 0; c < out.cols; ++c) {
      const auto all = static_cast<int32_t>(static_cast<uint32_t>(e.k) - 2 * differing_bits(call, c));
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

  static void plane_product(const BinaryDirectCall& call, const PlaneEpilogue& e) {
    for (int c = 0; c < call.out.cols; ++c) {
      const auto column_sum = static_cast<uint32_t>(e.layer.column_sum[c]);
      const uint32_t terms = static_cast<uint32_t>(*e.row_term) + static_cast<uint32_t>(e.column_factor) * column_sum;
      const uint32_t twice = terms - static_cast<uint32_t>(e.count_factor) * differing_bits(call, c);
      const int32_t sum = static_cast<int32_t>(twice) >> 1;
      reference::store_exact(static_cast<uint32_t>(sum), *e.row_scale, e.layer, c, call.out);
    }
  }
};

}  // namespace

const BinaryKernels kBinaryReference = make_binary_kernels<Loops>({1, 64, 64, 8, 0});

}  // namespace kdq
