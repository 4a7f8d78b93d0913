// The binary family's loops, written once. An ISA file includes its vec_*.h, defines `struct Bits` (vectors of 64-bit
// words, how it counts bits, its register tile), and then includes this.
//
// Bits::add(sum, v) adds the number of set bits of v to running sums; these may be narrower than 64 bits, so after
// Bits::kFlush words they go through Bits::widen into 64-bit lanes.
#pragma once

#include "core/binary_gemm_kernels.h"
#include "x86/loops_simd.h"

namespace kdq {
namespace {

struct Loops {
  using W = Bits::Words;
  static constexpr int kCols = Bits::kCols;
  static constexpr int kPanel = kCols * Bits::kLanes;  // channels of a panel

  template <class T>
  static void pack_row(const void* x_raw, int64_t k, uint64_t* bits) {
    const T* x = static_cast<const T*>(x_raw);
    for (int64_t first = 0; first < k; first += 64) {
      uint64_t word = 0;
      const int64_t count = k - first < 64 ? k - first : 64;
      for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
        word |= static_cast<uint64_t>(Vec::bits(Vec::less(load(x + first + i, n), Vec::zero()))) << i;
      });
      bits[first / 64] = word;
    }
  }

  template <int kRows>
  static void tile_rows(const uint64_t* a, int64_t row_words, const uint64_t* panel, int64_t words, int32_t* counts) {
    W total[kRows][kCols];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int c = 0; c < kCols; ++c) total[r][c] = Bits::zero();
    }
    for (int64_t first = 0; first < words; first += Bits::kFlush) {
      const int64_t last = words - first < Bits::kFlush ? words : first + Bits::kFlush;
      W sum[kRows][kCols];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < kCols; ++c) sum[r][c] = Bits::zero();
      }
      for (int64_t w = first; w < last; ++w) {
        W weights[kCols];
#pragma GCC unroll 16
        for (int c = 0; c < kCols; ++c) weights[c] = Bits::load(panel + w * kPanel + c * Bits::kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const W word = Bits::set(a[r * row_words + w]);
#pragma GCC unroll 16
          for (int c = 0; c < kCols; ++c) sum[r][c] = Bits::add(sum[r][c], Bits::differ(word, weights[c]));
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < kCols; ++c) total[r][c] = Bits::add_widened(total[r][c], sum[r][c]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int c = 0; c < kCols; ++c) Bits::store_narrow(counts + r * kPanel + c * Bits::kLanes, total[r][c]);
    }
  }

  // From a run-time number of rows to the instance compiled for it.
  template <int kRows>
  static void tile_of(const uint64_t* a, int64_t row_words, int rows, const uint64_t* panel, int64_t words,
                      int32_t* counts) {
    if (rows == kRows) return tile_rows<kRows>(a, row_words, panel, words, counts);
    if constexpr (kRows > 1) tile_of<kRows - 1>(a, row_words, rows, panel, words, counts);
  }

  static void tile(const uint64_t* a, int64_t row_words, int rows, const uint64_t* panel, int64_t words,
                   int32_t* counts) {
    tile_of<Bits::kRows>(a, row_words, rows, panel, words, counts);
  }

  static void direct(const uint64_t* a, const uint64_t* b, int64_t words, int channels, int32_t* counts) {
    constexpr int64_t kStep = Bits::kLanes;
    const int64_t whole = words / kStep * kStep;
    for (int c = 0; c < channels; ++c, b += words) {
      W total = Bits::zero();
      for (int64_t first = 0; first < whole; first += Bits::kFlush * kStep) {
        const int64_t last = whole - first < Bits::kFlush * kStep ? whole : first + Bits::kFlush * kStep;
        W sum = Bits::zero();
        for (int64_t w = first; w < last; w += kStep) {
          sum = Bits::add(sum, Bits::differ(Bits::load(a + w), Bits::load(b + w)));
        }
        total = Bits::add_widened(total, sum);
      }
      int64_t count = Bits::sum_lanes(total);
      for (int64_t w = whole; w < words; ++w) count += __builtin_popcountll(a[w] ^ b[w]);
      counts[c] = static_cast<int32_t>(count);
    }
  }

  static Vec::Int dots(const int32_t* counts, int32_t k, int64_t i, int n) {
    const Vec::Int count = n == Vec::kLanes ? Vec::int_load(counts + i) : Vec::int_load_part(counts + i, n);
    return Vec::int_sub(Vec::int_set(k), Vec::int_add(count, count));
  }

  // Vectors of channels outside, rows inside: what belongs to a channel is read once a tile.
  static void store_int32(const int32_t* counts, const BinaryEpilogue& e, const TileOutput& out) {
    for_each_vector(out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
      for (int r = 0; r < out.rows; ++r) {
        int32_t* y = static_cast<int32_t*>(out.y) + r * out.y_stride;
        store_integers(y + i, dots(counts + r * out.width, e.k, i, n), n);
      }
    });
  }

  template <class T>
  static void store_linear(const int32_t* counts, const BinaryEpilogue& e, const TileOutput& out) {
    for_each_vector(out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Vec::Float scale = load(e.weight_scale + i, n);
      const Vec::Float bias = e.bias == nullptr ? Vec::zero() : load(e.bias + i, n);
      for (int r = 0; r < out.rows; ++r) {
        const Vec::Float scaled = Vec::mul(Vec::to_float(dots(counts + r * out.width, e.k, i, n)), scale);
        store(static_cast<T*>(out.y) + r * out.y_stride + i, Vec::add(scaled, bias), n);
      }
    });
  }
};

}  // namespace
}  // namespace kdq
