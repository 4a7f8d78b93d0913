// The binary family's loops, written once. An ISA file includes its vec_*.h, defines `struct Bits` (the steps along K,
// how they are counted, the register tile) and `struct RowBits` (how `direct` counts the bits of row-major vectors),
// and then includes this.
//
// Lanes are output channels: each step along K loads the vectors of weights and takes one Word of each activation row,
// so no sum ever crosses a lane. Bits::add(sum, Bits::set(word), weights) adds the number of differing bits to running
// sums. These are int32 results at once (Bits::kFlush = 0), or bytes that Bits::add_widened takes into 16 bits every
// Bits::kFlush steps.
//
// Products of bit planes take the same loop once for each pair of planes and double the sums in between, so that they
// need no further registers.
#pragma once

#include "core/binary_gemm_kernels.h"
#include "x86/bitplanes_simd.h"
#include "x86/loops_simd.h"

namespace kdq {
namespace {

struct Loops {
  using W = Bits::Words;
  using Word = Bits::Word;
  using I = Vec::Int;
  static constexpr int kLanes = Vec::kLanes;                 // channels of a vector of results
  static constexpr int kPanel = Bits::kCols * Bits::kLanes;  // channels of a panel

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

  template <class T>
  static PlaneRow pack_planes(const PlaneRowCall& call) {
    return quantize_planes<T>(call);
  }

  static void interleave(const uint64_t* b, int64_t words, int channels, char* panel) {
    Bits::interleave(b, words, channels, kPanel, panel);
  }
  static void spread(const uint64_t* bits, int64_t words, char* steps) { Bits::spread(bits, words, steps); }

  // ---- tile ----

  // kCols: vectors of weights.
  template <int kRows, int kCols>
  static void tile_of(const BinaryTileCall& call) {
    if constexpr (Bits::kFlush == 0) {
      W sum[kRows][kCols];
      clear(sum);
      const bool asks = kRows + 1 >= Bits::kRows && call.ahead != nullptr;
      if (call.planes == nullptr) {  // one pass, whose place need not be looked up: 8 cycles of a tile
        count_pass(call, {0, 0, false}, asks, sum);
      } else {
        for (int i = 0; i < call.passes->count; ++i) {
          const PlanePass& pass = call.passes->at[i];
          if (pass.doubles) twice(sum);
          count_pass(call, pass, asks && i == 0, sum);
        }
      }
      finish<kRows, kCols>(sum, call);
    } else {
      constexpr int kCounts = kRows * kCols * Bits::kLanes;
      alignas(64) int32_t counts[kRows][kCols * Bits::kLanes];
      constexpr int64_t kSpan = 65535 / 255 * Bits::kFlush;  // steps that 16 bits hold
      int32_t* dots = counts[0];
      for (int i = 0; i < call.passes->count; ++i) {
        const PlanePass& pass = call.passes->at[i];
        for (int j = 0; pass.doubles && j < kCounts; j += kLanes) {
          const I count = Vec::int_load(dots + j);
          Vec::store_int(dots + j, Vec::int_add(count, count));
        }
        int64_t first = 0;
        do {
          const int64_t last = call.steps - first < kSpan ? call.steps : first + kSpan;
          count_span<Bits>(call, pass, first, last, i + first > 0, counts);
          first += kSpan;
        } while (first < call.steps);
      }
      if (call.planes != nullptr) return store_planes(dots, kCols * Bits::kLanes, *call.planes, call.out);
      for (int i = 0; i < kCounts; i += kLanes) {
        Vec::store_int(dots + i, dots_of(Vec::int_load(dots + i), call.epilogue.k));
      }
      store_dots(dots, kCols * Bits::kLanes, call);
    }
  }

  // Sets the counts to what steps [first, last) differ in, or adds it. B: Bits, a parameter since those that do not
  // count in bytes lack what is used here.
  template <class B, int kRows, int kChannels>
  static inline __attribute__((always_inline)) void count_span(const BinaryTileCall& call, const PlanePass& pass,
                                                               int64_t first, int64_t last, bool add,
                                                               int32_t (&counts)[kRows][kChannels]) {
    constexpr int kCols = kChannels / B::kLanes;
    W total[kRows][kCols][2];
    for (auto& row : total) clear(row);
    for (; first < last; first += B::kFlush) {
      W sum[kRows][kCols];
      clear(sum);
      count<false>(call, pass, first, last - first < B::kFlush ? last : first + B::kFlush, sum);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kCols; ++v) {
          pin(sum[r][v]);  // one sum after the other: gathered, their halves would not fit into the registers
          B::add_widened(total[r][v], sum[r][v]);
          __asm__("" : "+m"(total[r][v]));
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kCols; ++v) B::put_widened(total[r][v], add, counts[r] + v * B::kLanes);
    }
  }

  template <int kRows, int kVectors>
  static inline __attribute__((always_inline)) void clear(W (&sum)[kRows][kVectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Bits::zero();
    }
  }

  template <int kRows, int kVectors>
  static inline __attribute__((always_inline)) void twice(W (&sum)[kRows][kVectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec::int_add(sum[r][v], sum[r][v]);
    }
  }

  template <int kRows, int kVectors>
  static inline __attribute__((always_inline)) void count_pass(const BinaryTileCall& call, const PlanePass& pass,
                                                               bool asks, W (&sum)[kRows][kVectors]) {
    if (asks) {
      count<true>(call, pass, 0, call.steps, sum);
    } else {
      count<false>(call, pass, 0, call.steps, sum);
    }
  }

  // Adds the bits in which steps [first, last) of a pass differ to the sums.
  template <bool kAhead, int kRows, int kVectors>
  static inline __attribute__((always_inline)) void count(const BinaryTileCall& call, const PlanePass& pass,
                                                          int64_t first, int64_t last, W (&sum)[kRows][kVectors]) {
    const Word* panel = reinterpret_cast<const Word*>(call.panel + pass.weights) + first * kPanel;
    const char* a = call.rows + pass.rows + first * static_cast<int64_t>(sizeof(Word));
    for (int64_t w = first; w < last; ++w, panel += kPanel, a += sizeof(Word)) {
      if (kAhead) _mm_prefetch(call.ahead + w * kLine, _MM_HINT_T1);
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
          Bits::add(sum[r][v], broadcast, weights[v]);
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
      if (call.out.cols <= (kCols - 1) * Bits::kLanes) return choose_cols<kRows, kCols - 1>(call);
    }
    tile_of<kRows, kCols>(call);
  }

  static void tile(const BinaryTileCall& call) { choose_rows<Bits::kRows>(call); }

  // ---- epilogue ----
  // As in the int8 family: whole vectors of int32 or float32 leave the registers finished, the rest goes through a
  // buffer.

  template <int kRows, int kCols>
  static inline __attribute__((always_inline)) void finish(const W (&count)[kRows][kCols], const BinaryTileCall& call) {
    const TileOutput& out = call.out;
    const bool whole = out.cols == kCols * kLanes && call.corrections == nullptr && call.planes == nullptr;
    if (whole && out.type == Result::kInt32) {
      out.place == Place::kMemory ? store_whole_int32<true, kRows, kCols>(count, call)
                                  : store_whole_int32<false, kRows, kCols>(count, call);
    } else if (whole && out.type == Result::kFloat32) {
      out.place == Place::kMemory ? store_whole_float32<true, kRows, kCols>(count, call)
                                  : store_whole_float32<false, kRows, kCols>(count, call);
    } else {
      alignas(64) int32_t dots[kRows * kCols * kLanes];
      if (call.planes != nullptr) {
        spill(count, dots, [](I of_bits) { return of_bits; });
        return store_planes(dots, kCols * kLanes, *call.planes, out);
      }
      spill(count, dots, [&](I of_bits) { return dots_of(of_bits, call.epilogue.k); });
      store_dots(dots, kCols * kLanes, call);
    }
  }

  template <int kRows, int kCols, class Value>
  static inline __attribute__((always_inline)) void spill(const W (&count)[kRows][kCols], int32_t* to, Value value) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kCols; ++v) Vec::store_int(to + (r * kCols + v) * kLanes, value(count[r][v]));
    }
  }

  template <bool kStream, int kRows, int kCols>
  static inline __attribute__((always_inline)) void store_whole_int32(const W (&count)[kRows][kCols],
                                                                      const BinaryTileCall& call) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      float* y = static_cast<float*>(call.out.y) + r * call.out.y_stride;  // 32 bits are moved, whatever they mean
#pragma GCC unroll 16
      for (int v = 0; v < kCols; ++v) {
        put<kStream>(y + v * kLanes, Vec::as_float(dots_of(count[r][v], call.epilogue.k)), kLanes);
      }
    }
    if (kStream) _mm_sfence();
  }

  template <bool kStream, int kRows, int kCols>
  static inline __attribute__((always_inline)) void store_whole_float32(const W (&count)[kRows][kCols],
                                                                        const BinaryTileCall& call) {
#pragma GCC unroll 16
    for (int v = 0; v < kCols; ++v) {
      const Channels c = channels_at(call.epilogue, v * kLanes, kLanes);
      float* y = static_cast<float*>(call.out.y) + v * kLanes;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        put<kStream>(y + r * call.out.y_stride, scaled(dots_of(count[r][v], call.epilogue.k), c), kLanes);
      }
    }
    if (kStream) _mm_sfence();
  }

  static I dots_of(I count, int32_t k) { return Vec::int_sub(Vec::int_set(k), Vec::int_add(count, count)); }

  struct Channels {
    Vec::Float scale;
    Vec::Float bias;
  };
  static Channels channels_at(const BinaryEpilogue& e, int64_t i, int n) {
    return {load(e.weight_scale + i, n), e.bias == nullptr ? Vec::zero() : load(e.bias + i, n)};
  }
  static Vec::Float scaled(I dot, const Channels& c) { return Vec::fma(Vec::to_float(dot), c.scale, c.bias); }

  // dots: rows of `width`, before their corrections.
  static void store_dots(int32_t* dots, int width, const BinaryTileCall& call) {
    for (int r = 0; call.corrections != nullptr && r < call.out.rows; ++r) {
      const int32_t* correction = call.corrections[r];
      int32_t* row = dots + r * width;
      if (correction == nullptr) continue;
      for_each_vector(call.out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
        Vec::store_int(row + i, Vec::int_sub(Vec::int_load(row + i), load_int(correction + i, n)));
      });
    }
    store_dots(dots, width, call.epilogue, call.out);
  }
  static void store_dots(const int32_t* dots, int width, const BinaryEpilogue& e, const TileOutput& out) {
    out.place == Place::kMemory ? store_dots_to<true>(dots, width, e, out) : store_dots_to<false>(dots, width, e, out);
    if (out.place == Place::kMemory) _mm_sfence();
  }
  template <bool kStream>
  static void store_dots_to(const int32_t* dots, int width, const BinaryEpilogue& e, const TileOutput& out) {
    switch (out.type) {
      case Result::kFloat32:
        return store_linear<kStream, float>(dots, width, e, out);
      case Result::kBFloat16:
        return store_linear<kStream, BFloat16>(dots, width, e, out);
      case Result::kFloat16:
        return store_linear<kStream, Float16>(dots, width, e, out);
      case Result::kInt32:
        return store_int32<kStream>(dots, width, out);
      case Result::kBits:
        return store_bits(dots, width, e, out);
    }
  }

  // Lanes past the last channel are 0, and so are their thresholds: 0 < 0 is false, and the tail bits are zero.
  static void store_bits(const int32_t* dots, int width, const BinaryEpilogue& e, const TileOutput& out) {
    for (int r = 0; r < out.rows; ++r, dots += width) {
      uint64_t* y = static_cast<uint64_t*>(out.y) + r * out.y_stride;
      for (int first = 0; first < out.cols; first += 64) {
        uint64_t word = 0;
        for_each_vector(
            out.cols - first < 64 ? out.cols - first : 64, [&](int64_t i, int n) __attribute__((always_inline)) {
              const auto below = Vec::int_less(load_int(dots + first + i, n), load_int(e.threshold + first + i, n));
              word |= static_cast<uint64_t>(Vec::bits(below)) << i;
            });
        y[first / 64] = word;
      }
    }
  }

  template <bool kStream>
  static void store_int32(const int32_t* dots, int width, const TileOutput& out) {
    for (int r = 0; r < out.rows; ++r, dots += width) {
      float* y = static_cast<float*>(out.y) + r * out.y_stride;  // as in store_whole_int32
      for_each_vector(out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
        put<kStream>(y + i, Vec::as_float(load_int(dots + i, n)), n);
      });
    }
  }

  template <bool kStream, class T>
  static void store_linear(const int32_t* dots, int width, const BinaryEpilogue& e, const TileOutput& out) {
    for_each_vector(out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Channels c = channels_at(e, i, n);
      for (int r = 0; r < out.rows; ++r) {
        T* y = static_cast<T*>(out.y) + r * out.y_stride;
        put<kStream>(y + i, scaled(load_int(dots + r * width + i, n), c), n);
      }
    });
  }

  // ---- direct ----

  static constexpr int kAtOnce = 4;  // channels, whose lanes are added up together

  // Runs along K on row-major weights; out.cols <= kDirectChannels.
  static void direct(const BinaryDirectCall& call) {
    alignas(64) int32_t dots[kDirectChannels] = {};
    for (int c = 0; c < call.out.cols; c += kAtOnce) count_channels(call, c, dots + c);
    if (call.planes != nullptr) return store_planes(dots, kDirectChannels, *call.planes, call.out);
    for (int c = 0; c < call.out.cols; c += kLanes) {
      Vec::store_int(dots + c, dots_of(Vec::int_load(dots + c), call.epilogue.k));
    }
    store_dots(dots, kDirectChannels, call.epilogue, call.out);
  }

  // Of channels first ... first + kAtOnce - 1, the last one in place of those that are not there.
  static void count_channels(const BinaryDirectCall& call, int first, int32_t* counts) {
    I total[kAtOnce];
    for (I& sum : total) sum = Vec::int_zero();
    for (int i = 0; i < call.passes->count; ++i) {
      const PlanePass& pass = call.passes->at[i];
      const uint64_t* b[kAtOnce];
#pragma GCC unroll 4
      for (int j = 0; j < kAtOnce; ++j) {
        const int channel = first + j < call.out.cols ? first + j : call.out.cols - 1;
        b[j] = call.b + channel * call.words + pass.weights / kWordBytes;
        if (pass.doubles) total[j] = Vec::int_add(total[j], total[j]);
      }
      add_differing(call.a + pass.rows / kWordBytes, b, call.words, total);
    }
    Vec::store_sums(counts, total);
  }

  static constexpr int64_t kWordBytes = sizeof(uint64_t);
  static constexpr int64_t kWords = sizeof(I) / kWordBytes;  // of a vector
  static constexpr int64_t kFlushWords = RowBits::kFlush == 0 ? int64_t{1} << 40 : RowBits::kFlush * kWords;

  static inline __attribute__((always_inline)) void add_differing(const uint64_t* a, const uint64_t* (&b)[kAtOnce],
                                                                  int64_t words, I (&total)[kAtOnce]) {
    for (int64_t w = 0; w < words;) {
      const int64_t last = words - w < kFlushWords ? words : w + kFlushWords;
      I sum[kAtOnce];
      for (I& of_channel : sum) of_channel = Vec::int_zero();
      for (; w + kWords <= last; w += kWords) {
        const I of_row = Vec::load_words(a + w);
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j) {
          _mm_prefetch(b[j] + w + kWordsAhead, _MM_HINT_T0);
          sum[j] = RowBits::add(sum[j], Vec::int_xor(of_row, Vec::load_words(b[j] + w)));
        }
      }
      if (w < last) {
        const int n = static_cast<int>(last - w);
        const I of_row = Vec::load_words_part(a + w, n);
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j) {
          sum[j] = RowBits::add(sum[j], Vec::int_xor(of_row, Vec::load_words_part(b[j] + w, n)));
        }
        w = last;
      }
#pragma GCC unroll 4
      for (int j = 0; j < kAtOnce; ++j) total[j] = RowBits::add_widened(total[j], sum[j]);
    }
  }
};

}  // namespace
}  // namespace kdq
