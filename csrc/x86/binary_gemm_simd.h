// The binary family's loops, written once. An ISA file includes its vec_*.h, defines `struct Bits` (vectors of words,
// how it counts bits, its register tile), and then includes this.
//
// Lanes are output channels: each step along K loads the vectors of weights and broadcasts one word of each activation
// row, so no sum ever crosses a lane. Bits::add(sum, v) adds the number of set bits of v to running sums; where these
// are narrower than a word, Bits::add_widened takes them into whole words every Bits::kFlush steps (0: never).
#pragma once

#include "core/binary_gemm_kernels.h"
#include "x86/loops_simd.h"

namespace kdq {
namespace {

struct Loops {
  using W = Bits::Words;
  using Word = Bits::Word;
  using I = Vec::Int;
  static constexpr int kLanes = Vec::kLanes;                    // channels of a vector of results
  static constexpr int kWide = sizeof(Word) / sizeof(int32_t);  // vectors of words that it takes
  static constexpr int kPanel = Bits::kCols * kLanes;           // channels of a panel

  template <class T>
  static void pack_row(const void* x_raw, int64_t k, uint64_t* bits) {
    constexpr int kVectors = 64 / kLanes;
    const T* x = static_cast<const T*>(x_raw);
    int64_t first = 0;
    for (; first + 64 <= k; first += 64) {
      Vec::Float v[kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) v[i] = Vec::load(x + first + i * kLanes);
      bits[first / 64] = Vec::below_zero(v);
    }
    if (first == k) return;
    uint64_t word = 0;
    for_each_vector(k - first, [&](int64_t i, int n) __attribute__((always_inline)) {
      word |= static_cast<uint64_t>(Vec::bits(Vec::less(load(x + first + i, n), Vec::zero()))) << i;
    });
    bits[first / 64] = word;
  }

  static void interleave(const uint64_t* b, int64_t words, int channels, char* panel) {
    Bits::interleave(b, words, channels, kPanel, panel);
  }

  // ---- tile ----

  // kCols: vectors of results.
  template <int kRows, int kCols>
  static void tile_of(const BinaryTileCall& call) {
    constexpr int kVectors = kCols * kWide;
    W total[kRows][kVectors];
    clear(total);
    if constexpr (Bits::kFlush == 0) {
      count(call, 0, call.words, total);
    } else {
      for (int64_t first = 0; first < call.words; first += Bits::kFlush) {
        W sum[kRows][kVectors];
        clear(sum);
        count(call, first, call.words - first < Bits::kFlush ? call.words : first + Bits::kFlush, sum);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) total[r][v] = Bits::add_widened(total[r][v], sum[r][v]);
        }
      }
    }
    finish<kRows, kCols>(total, call);
  }

  template <int kRows, int kVectors>
  static inline __attribute__((always_inline)) void clear(W (&sum)[kRows][kVectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Bits::zero();
    }
  }

  // Adds the bits in which words [first, last) differ to the sums.
  template <int kRows, int kVectors>
  static inline __attribute__((always_inline)) void count(const BinaryTileCall& call, int64_t first, int64_t last,
                                                          W (&sum)[kRows][kVectors]) {
    const Word* panel = reinterpret_cast<const Word*>(call.panel) + first * kPanel;
    const char* a = call.rows + first * static_cast<int64_t>(sizeof(Word));
    for (int64_t w = first; w < last; ++w, panel += kPanel, a += sizeof(Word)) {
      W weights[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) weights[v] = Bits::load(panel + v * Bits::kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        Word word = 0;
        memcpy(&word, a + r * call.row_stride, sizeof(Word));
        const W broadcast = Bits::set(word);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = Bits::add(sum[r][v], Bits::differ(broadcast, weights[v]));
          pin(sum[r][v]);
        }
      }
    }
  }

  // From run-time numbers of rows and channels to the instance compiled for them.
  template <int kRows>
  static void choose_rows(const BinaryTileCall& call) {
    if (call.out.rows == kRows) return choose_cols<kRows, Bits::kCols>(call);
    if constexpr (kRows > 1) choose_rows<kRows - 1>(call);
  }
  template <int kRows, int kCols>
  static void choose_cols(const BinaryTileCall& call) {
    if constexpr (kCols > 1) {
      if (call.out.cols <= (kCols - 1) * kLanes) return choose_cols<kRows, kCols - 1>(call);
    }
    tile_of<kRows, kCols>(call);
  }

  static void tile(const BinaryTileCall& call) { choose_rows<Bits::kRows>(call); }

  // ---- epilogue ----
  // As in the int8 family: whole vectors of int32 or float32 leave the registers finished, the rest goes through a
  // buffer.

  template <int kRows, int kCols>
  static inline __attribute__((always_inline)) void finish(const W (&total)[kRows][kCols * kWide],
                                                           const BinaryTileCall& call) {
    const TileOutput& out = call.out;
    const bool whole = out.cols == kCols * kLanes;
    if (whole && out.type == Result::kInt32) {
      out.place == Place::kMemory ? store_whole_int32<true, kRows, kCols>(total, call)
                                  : store_whole_int32<false, kRows, kCols>(total, call);
    } else if (whole && out.type == Result::kFloat32) {
      out.place == Place::kMemory ? store_whole_float32<true, kRows, kCols>(total, call)
                                  : store_whole_float32<false, kRows, kCols>(total, call);
    } else {
      alignas(64) int32_t counts[kRows * kCols * kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kCols; ++v)
          Vec::store_int(counts + (r * kCols + v) * kLanes,
                         Bits::narrow(total[r][v * kWide], total[r][v * kWide + kWide - 1]));
      }
      store_counts(counts, kCols * kLanes, call.epilogue, out);
    }
  }

  template <bool kStream, int kRows, int kCols>
  static inline __attribute__((always_inline)) void store_whole_int32(const W (&total)[kRows][kCols * kWide],
                                                                      const BinaryTileCall& call) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      float* y = static_cast<float*>(call.out.y) + r * call.out.y_stride;  // 32 bits are moved, whatever they mean
#pragma GCC unroll 16
      for (int v = 0; v < kCols; ++v) {
        const I count = Bits::narrow(total[r][v * kWide], total[r][v * kWide + kWide - 1]);
        put<kStream>(y + v * kLanes, Vec::as_float(dots(count, call.epilogue.k)), kLanes);
      }
    }
    if (kStream) _mm_sfence();
  }

  template <bool kStream, int kRows, int kCols>
  static inline __attribute__((always_inline)) void store_whole_float32(const W (&total)[kRows][kCols * kWide],
                                                                        const BinaryTileCall& call) {
#pragma GCC unroll 16
    for (int v = 0; v < kCols; ++v) {
      const Channels c = channels_at(call.epilogue, v * kLanes, kLanes);
      float* y = static_cast<float*>(call.out.y) + v * kLanes;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const I count = Bits::narrow(total[r][v * kWide], total[r][v * kWide + kWide - 1]);
        put<kStream>(y + r * call.out.y_stride, scaled(count, call.epilogue.k, c), kLanes);
      }
    }
    if (kStream) _mm_sfence();
  }

  static I dots(I count, int32_t k) { return Vec::int_sub(Vec::int_set(k), Vec::int_add(count, count)); }

  struct Channels {
    Vec::Float scale;
    Vec::Float bias;
  };
  static Channels channels_at(const BinaryEpilogue& e, int64_t i, int n) {
    return {load(e.weight_scale + i, n), e.bias == nullptr ? Vec::zero() : load(e.bias + i, n)};
  }
  static Vec::Float scaled(I count, int32_t k, const Channels& c) {
    return Vec::fma(Vec::to_float(dots(count, k)), c.scale, c.bias);
  }

  // counts: rows of `width`.
  static void store_counts(const int32_t* counts, int width, const BinaryEpilogue& e, const TileOutput& out) {
    switch (out.type) {
      case Result::kFloat32:
        return store_linear<float>(counts, width, e, out);
      case Result::kBFloat16:
        return store_linear<BFloat16>(counts, width, e, out);
      case Result::kFloat16:
        return store_linear<Float16>(counts, width, e, out);
      case Result::kInt32:
        return store_int32(counts, width, e, out);
    }
  }

  static void store_int32(const int32_t* counts, int width, const BinaryEpilogue& e, const TileOutput& out) {
    for_each_vector(out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
      for (int r = 0; r < out.rows; ++r) {
        int32_t* y = static_cast<int32_t*>(out.y) + r * out.y_stride;
        store_integers(y + i, dots(load_int(counts + r * width + i, n), e.k), n);
      }
    });
  }

  template <class T>
  static void store_linear(const int32_t* counts, int width, const BinaryEpilogue& e, const TileOutput& out) {
    for_each_vector(out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Channels c = channels_at(e, i, n);
      for (int r = 0; r < out.rows; ++r) {
        T* y = static_cast<T*>(out.y) + r * out.y_stride;
        store(y + i, scaled(load_int(counts + r * width + i, n), e.k, c), n);
      }
    });
  }

  // ---- direct ----

  // Runs along K on row-major weights; out.cols <= kDirectChannels.
  static void direct(const uint64_t* a, const uint64_t* b, int64_t words, const BinaryEpilogue& e,
                     const TileOutput& out) {
    alignas(64) int32_t counts[kDirectChannels];
    for (int c = 0; c < out.cols; ++c) counts[c] = differing_bits(a, b + c * words, words);
    store_counts(counts, kDirectChannels, e, out);
  }

  static int32_t differing_bits(const uint64_t* a, const uint64_t* b, int64_t words) {
    constexpr int64_t kStep = sizeof(W) / sizeof(uint64_t);
    constexpr int64_t kFlush = Bits::kFlush == 0 ? int64_t{1} << 40 : Bits::kFlush;
    const int64_t whole = words / kStep * kStep;
    W total = Bits::zero();
    for (int64_t first = 0; first < whole; first += kFlush * kStep) {
      const int64_t last = whole - first < kFlush * kStep ? whole : first + kFlush * kStep;
      W sum = Bits::zero();
      for (int64_t w = first; w < last; w += kStep) {
        sum = Bits::add(sum, Bits::differ(Bits::load(reinterpret_cast<const Word*>(a + w)),
                                          Bits::load(reinterpret_cast<const Word*>(b + w))));
      }
      total = Bits::add_widened(total, sum);
    }
    int64_t count = Bits::sum_lanes(total);
    for (int64_t w = whole; w < words; ++w) count += __builtin_popcountll(a[w] ^ b[w]);
    return static_cast<int32_t>(count);
  }
};

}  // namespace
}  // namespace kdq
