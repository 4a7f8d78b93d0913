// The codebook family's loops, written once. An ISA file includes its vec_*.h, defines the look-ups, `struct Small` (of
// up to kSmallBits bits an index), `struct Four` and `struct Five`, and the shape of tiles, and then includes this.
//
// Lanes are output channels. A word holds the indices of one channel's consecutive inputs: each step takes the lowest
// index of every lane (look-ups ignore the bits above), multiplies its centroid by the activation of each row, and
// shifts the words on. With one row, that is a shift, a permutation and a multiplication for a vector of weights, in as
// many chains as there are vectors; with a full tile the multiplications hide the rest.
#pragma once

#include "core/codebook_kernels.h"
#include "kdq/codebook.h"
#include "x86/epilogue_simd.h"
#include "x86/loops_simd.h"

namespace kdq {
namespace {

struct Loops {
  using F = Vec::Float;
  using I = Vec::Int;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kPanelVectors = static_cast<int>(kCodebookLanes) / kLanes;
  static constexpr int64_t kStepsAhead = 16;  // a step's words, a line, are asked for so many steps before

  static int panels_at_once(int rows) { return most_panels(rows); }

  template <class T>
  static void widen(const void* x_raw, int64_t k, int64_t padded, float* row) {
    const T* x = static_cast<const T*>(x_raw);
    for_each_vector(k, [&](int64_t i, int n) __attribute__((always_inline)) { store(row + i, load(x + i, n), n); });
    for (int64_t i = k; i < padded; ++i) row[i] = 0.0F;
  }

  static void tile(const CodebookTileCall& call) {
    prefetch_output(call.out);
    if (call.bits <= kSmallBits) return choose_rows<Small>(call);
    if (call.bits == 4) return choose_rows<Four>(call);
    choose_rows<Five>(call);
  }

 private:
  // From run-time numbers of rows and panels to the instances compiled for them.
  template <class Lookup, int kRows = kTileRows>
  static void choose_rows(const CodebookTileCall& call) {
    if (call.out.rows == kRows) return choose_panels<Lookup, kRows, most_panels(kRows)>(call, 0);
    if constexpr (kRows > 1) choose_rows<Lookup, kRows - 1>(call);
  }

  // The panels from `first` on: kPanels at a time while there are so many, the rest by halves of that.
  template <class Lookup, int kRows, int kPanels>
  static void choose_panels(const CodebookTileCall& call, int first) {
    for (; first + kPanels <= call.panels.count; first += kPanels) tile_of<Lookup, kRows, kPanels>(call, first);
    if constexpr (kPanels > 1) {
      if (first < call.panels.count) choose_panels<Lookup, kRows, kPanels / 2>(call, first);
    }
  }

  template <class Lookup, int kRows, int kPanels>
  static void tile_of(const CodebookTileCall& call, int first) {
    constexpr int kVectors = kPanels * kPanelVectors;
    const Lookup lookup(call.table);
    const I bits = Vec::int_set(call.bits);
    const int per_word = 32 / call.bits;
    const int32_t* panel = reinterpret_cast<const int32_t*>(call.panels.words + first * call.panels.stride);
    const float* x = call.rows;
    F sum[kRows][kVectors];
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kVectors; ++i) sum[i / kVectors][i % kVectors] = Vec::zero();
    for (int64_t step = 0; step < call.steps; ++step) {
      I words[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const int32_t* at = panel + v / kPanelVectors * call.panels.stride + v % kPanelVectors * kLanes;
        words[v] = Vec::int_load(at);
        if (v % kPanelVectors == 0) _mm_prefetch(at + kStepsAhead * kCodebookLanes, _MM_HINT_T0);
      }
      for (int j = 0; j < per_word; ++j, ++x) add_products(lookup, bits, x, call.row_stride, words, sum);
      panel += kCodebookLanes;
    }
    alignas(64) float spilled[kRows * kVectors * kLanes];
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kVectors; ++i) Vec::store(spilled + i * kLanes, sum[i / kVectors][i % kVectors]);
    finish(spilled, first * static_cast<int>(kCodebookLanes), kPanels * static_cast<int>(kCodebookLanes), call);
  }

  // Of the lowest index in each lane.
  template <class Lookup, int kRows, int kVectors>
  static inline __attribute__((always_inline)) void add_products(const Lookup& lookup, I bits, const float* x,
                                                                 int64_t row_stride, I (&words)[kVectors],
                                                                 F (&sum)[kRows][kVectors]) {
    const auto add = [&](int r, int v, F x_r, F w) __attribute__((always_inline)) {
      sum[r][v] = Vec::fma(x_r, w, sum[r][v]);
      pin(sum[r][v]);
    };
    const auto activation = [&](int r) __attribute__((always_inline)) { return Vec::set(x[r * row_stride]); };
    const auto next_weights = [&](int v) __attribute__((always_inline)) {
      const F w = lookup.at(words[v]);
      words[v] = Vec::shift_right(words[v], bits);
      return w;
    };
    for_each_product<F, kRows, kVectors>(activation, next_weights, add);
  }

  // sums: rows of `width`, of the channels from `first` on.
  static void finish(float* sums, int first, int width, const CodebookTileCall& call) {
    TileOutput out = call.out;
    out.y = static_cast<char*>(out.y) + first * out.element_bytes;
    out.cols = out.cols - first < width ? out.cols - first : width;
    if (call.bias != nullptr) add_bias(sums, width, call.bias + first, out);
    activate(sums, out.rows * width / kLanes, call.activation);
    store_values(sums, width, out);
  }

  static void add_bias(float* sums, int width, const float* bias, const TileOutput& out) {
    for_each_vector(out.cols, [&](int64_t i, int n) __attribute__((always_inline)) {
      const F b = load(bias + i, n);
      for (int r = 0; r < out.rows; ++r) Vec::store(sums + r * width + i, Vec::add(Vec::load(sums + r * width + i), b));
    });
  }
};

}  // namespace
}  // namespace kdq
