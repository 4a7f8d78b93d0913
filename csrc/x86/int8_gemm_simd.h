// The int8 family's loops, written once. An ISA file includes its vec_*.h, defines `struct Dot` (its dot-product
// instruction and register tile), and then includes this.
//
// The micro-kernel keeps a tile of kRows x kVectors int32 vectors of sums in registers. Each step along K loads the
// vectors of weights, broadcasts one 32-bit unit (2 x s16 or 4 x u8) of each activation row to all lanes, and issues
// kRows * kVectors dot products. Lanes are output channels, so no sum ever crosses a lane.
//
// With 6 x 4 vectors of AVX-512 a step reads 4 vectors of weights and 6 units for 24 products, so that even weights
// streamed from L2 keep up: 98 % of the peak and more are measured for the loop alone. docs/cpu-limits.md tells what is
// lost around it.
#pragma once

#include "core/int8_gemm_kernels.h"
#include "x86/int8_epilogue_simd.h"
#include "x86/loops_simd.h"
#include "x86/static_steps_simd.h"

namespace kdq {
namespace {

struct Loops {
  using F = Vec::Float;
  using I = Vec::Int;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kCols = Dot::kCols;
  static constexpr int kPanel = kCols * kLanes;  // channels of a panel
  static constexpr int64_t kOutputSteps = 32;    // before a tile's last step its output is asked for
  // Bytes asked for at a step: one tile, or two, ask for a whole panel, and one for most of the float32 rows that the
  // next one needs. None where a step has less than a line of weights.
  static constexpr int64_t kPanelLines = kPanel * Dot::kUnit / kLine;
  static constexpr int64_t kAheadStep = (kPanelLines > 1 ? kPanelLines / 2 : kPanelLines) * kLine;
  // All lines of a step, or the one that it is a part of. Several tiles share the asking by going on more slowly, so
  // that each line is asked for by several of their steps: a prefetch of what is there is next to nothing.
  static constexpr int64_t kStreamedStep = (kPanelLines > 0 ? kPanelLines : 1) * kLine;
  using Prepared = Dot::Prepared;

  // ---- prepare ----

  static void pad(Prepared* row, int64_t k) {
    for (int64_t i = k; i % Dot::kUnit != 0; ++i) row[i] = 0;
  }

  // body(x, row, r) for each row.
  template <class T, class Row, class Body>
  static inline __attribute__((always_inline)) void for_each_row(const Int8RowsCall& call, Body body) {
    for (int r = 0; r < call.count; ++r) {
      body(static_cast<const T*>(call.x) + r * call.k,
           reinterpret_cast<Row*>(static_cast<char*>(call.rows) + r * call.stride), r);
    }
  }

  static void prepare_int8(const Int8RowsCall& call) {
    const int64_t k = call.k;
    for_each_row<int8_t, Prepared>(call, [k](const int8_t* a, Prepared* row, int) {
      for (int64_t i = 0; i < k; ++i) row[i] = static_cast<Prepared>(a[i] + Dot::kOffset);
      pad(row, k);
    });
  }

  // row[i] = round(value(i, n, j)) + kOffset + zero_point, which fits: a full vector of Prepared at a time, then the
  // rest. j tells neighbours apart.
  template <int kOffset, class Value>
  static inline __attribute__((always_inline)) void quantize_row(Prepared* row, int64_t k, int zero_point,
                                                                 Value value) {
    constexpr int kStep = 4 / sizeof(Prepared);  // vectors of float32 that narrow to one
    int64_t i = 0;
    for (; i + kStep * kLanes <= k; i += kStep * kLanes) {
      F v[kStep];
#pragma GCC unroll 4
      for (int j = 0; j < kStep; ++j) v[j] = value(i + j * kLanes, kLanes, j);
      Vec::store_rounded<kOffset>(row + i, v, zero_point);
    }
    const I offset = Vec::int_set(kOffset + zero_point);
    for_each_vector(k - i, [&](int64_t j, int n) __attribute__((always_inline)) {
      store_integers(row + i + j, Vec::int_add(Vec::to_int(value(i + j, n, 0)), offset), n);
    });
    pad(row, k);
  }

  // No clamping: |x| / scale <= 127 but for rounding errors far below a half.
  template <class T>
  static void prepare_dynamic(const Int8RowsCall& call) {
    symmetric_scales(static_cast<const T*>(call.x), call.count, call.k, call.scales);
    for_each_row<T, Prepared>(call, [&](const T* x, Prepared* row, int r) __attribute__((always_inline)) {
      float& scale = call.scales[r];
      const bool finite = scale <= kFloatMax;
      const F inverse = Vec::set(finite ? 1.0F / scale : 0.0F);
      if (!finite) scale = __builtin_nanf("");
      quantize_row<Dot::kOffset>(row, call.k, 0, [&](int64_t i, int n, int) __attribute__((always_inline)) {
        return Vec::mul(load(x + i, n), inverse);
      });
    });
  }

  template <class T>
  static void prepare_static(const Int8RowsCall& call, const StaticGrid& grid, float scale) {
    for_each_row<T, Prepared>(call, [&](const T* x, Prepared* row, int r) __attribute__((always_inline)) {
      StaticSteps steps(grid);
      quantize_row<0>(row, call.k, grid.zero_point, [&](int64_t i, int n, int j) __attribute__((always_inline)) {
        return steps.at(load(x + i, n), j);
      });
      call.scales[r] = steps.has_nan() ? __builtin_nanf("") : scale;
    });
  }

  template <class T>
  static void widen(const Int8RowsCall& call) {
    for_each_row<T, float>(call, [&](const T* x, float* row, int) __attribute__((always_inline)) {
      for_each_vector(call.k,
                      [&](int64_t i, int n) __attribute__((always_inline)) { store(row + i, load(x + i, n), n); });
      for (int64_t i = call.k; i % Dot::kUnit != 0; ++i) row[i] = 0.0F;
    });
  }

  template <class T>
  static void row_scales(const void* x, int rows, int64_t k, float* scales) {
    symmetric_scales(static_cast<const T*>(x), rows, k, scales);
  }

  // ---- tile ----

  // What a tile asks for at each step, and into which cache. Low tiles do not ask, unless their weights are streamed:
  // these are to be in L1 in time, as they are read at the pace at which they arrive.
  template <bool kStreams, int kRows>
  static inline __attribute__((always_inline)) void ask(const char* ahead) {
    constexpr int64_t kStep = kStreams ? kStreamedStep : kRows + 1 >= Dot::kRows ? kAheadStep : 0;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kStep; i += kLine) _mm_prefetch(ahead + i, kStreams ? _MM_HINT_T0 : _MM_HINT_T1);
  }

  // step(u, panel) along K, kShares units at a time, asking for what is read next and for the output's lines.
  template <bool kStreams, int kShares, int kRows, int kVectors, class Step>
  static inline __attribute__((always_inline)) void for_each_step(const Int8TileCall& call, Step step) {
    const int8_t* panel = call.panels.first;
    const char* ahead = call.ahead;
    int64_t u = 0;
    const bool is_near = call.out.place == Place::kNear || (kStreams && call.sums_after != nullptr);
    const int64_t last_steps = is_near ? 0 : kOutputSteps;
    for (int64_t end = call.units > last_steps ? call.units - last_steps : 0;; end = call.units) {
      for (; u < end; u += kShares, panel += step_bytes<kVectors>(call.panels)) {
        ask<kStreams, kRows>(ahead);
        ahead += call.ahead_step;
        step(u, panel);
      }
      if (u == call.units) break;
      prefetch_output(call.out);
    }
  }

  // Sums begin with zeros, or with what the pieces of k before came to, and end there if more pieces follow.
  template <bool kStreams, int kRows, int kVectors, class Sum>
  static inline __attribute__((always_inline)) void begin(const Int8TileCall& call, Sum (&sum)[kRows][kVectors]) {
    const bool goes_on = kStreams && call.sums_before != nullptr;
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kVectors; ++i) {
      Sum& s = sum[i / kVectors][i % kVectors];
      goes_on ? load_sum(call.sums_before + sum_at<kVectors>(i), s) : clear_sum(s);
    }
  }
  template <bool kStreams, int kRows, int kVectors, class Sum>
  static inline __attribute__((always_inline)) bool end_of_piece(const Sum (&sum)[kRows][kVectors],
                                                                 const Int8TileCall& call) {
    if (!kStreams || call.sums_after == nullptr) return false;
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kVectors; ++i) {
      store_sum(call.sums_after + sum_at<kVectors>(i), sum[i / kVectors][i % kVectors]);
    }
    return true;
  }
  template <int kVectors>
  static constexpr int sum_at(int i) {
    return i / kVectors * kPanel + i % kVectors * kLanes;
  }
  static void clear_sum(I& sum) { sum = Vec::int_zero(); }
  static void clear_sum(F& sum) { sum = Vec::zero(); }
  static void load_sum(const int32_t* p, I& sum) { sum = Vec::int_load(p); }
  static void load_sum(const int32_t* p, F& sum) { sum = Vec::load(reinterpret_cast<const float*>(p)); }
  static void store_sum(int32_t* p, I sum) { Vec::store_int(p, sum); }
  static void store_sum(int32_t* p, F sum) { Vec::store(reinterpret_cast<float*>(p), sum); }

  // kRows rows, kVectors vectors of channels: of one panel, or of all the vectors of several panels.
  template <bool kStreams, int kRows, int kVectors>
  static void tile_of(const Int8TileCall& call) {
    I sum[kRows][kVectors];
    begin<kStreams>(call, sum);
    const char* a = static_cast<const char*>(call.rows);
    const auto step = [&](int64_t u, const int8_t* panel) __attribute__((always_inline)) {
      I weights[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) weights[v] = weights_at(panel, call.panels, v);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int32_t unit = 0;
        memcpy(&unit, a + r * call.row_stride + u * 4, sizeof(unit));
        const I activations = Vec::int_set(unit);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = Dot::dot(sum[r][v], activations, weights[v]);
          pin(sum[r][v]);
        }
      }
    };
    for_each_step<kStreams, 1, kRows, kVectors>(call, step);
    if (!end_of_piece<kStreams>(sum, call)) finish(sum, call);
  }

  // As tile_of(), of weights of kBits bits: a vector of panel bytes holds as many units as share them. Each unit's are
  // shifted to the top of their bytes and the others masked out: 3 instructions for 128 weights of 4 bits, which hide
  // behind reading half of the bytes, and behind the products from some rows on.
  template <int kBits, bool kStreams, int kRows, int kVectors>
  static void few_bit_tile_of(const Int8TileCall& call) {
    constexpr int kShares = 8 / kBits;
    I sum[kRows][kVectors];
    begin<kStreams>(call, sum);
    const char* a = static_cast<const char*>(call.rows);
    const auto step = [&](int64_t u, const int8_t* panel)
                          __attribute__((always_inline)) { few_bit_step<kBits, 0>(a + u * 4, panel, call, sum); };
    for_each_step<kStreams, kShares, kRows, kVectors>(call, step);
    if (!end_of_piece<kStreams>(sum, call)) finish(sum, call);
  }

  template <int kBits, int kShare, int kRows, int kVectors>
  static inline __attribute__((always_inline)) void few_bit_step(const char* a, const int8_t* panel,
                                                                 const Int8TileCall& call, I (&sum)[kRows][kVectors]) {
    const auto activations = [&](int r) __attribute__((always_inline)) {
      int32_t unit = 0;
      memcpy(&unit, a + r * call.row_stride + kShare * 4, sizeof(unit));
      return Vec::int_set(unit);
    };
    const auto weights = [&](int v) __attribute__((always_inline)) {
      return Dot::template load_few_bits<kBits, kShare>(panel + offset_of(call.panels, v));
    };
    const auto add = [&](int r, int v, I x, I w) __attribute__((always_inline)) {
      sum[r][v] = Dot::dot(sum[r][v], x, w);
      pin(sum[r][v]);
    };
    for_each_product<I, kRows, kVectors>(activations, weights, add);
    if constexpr ((kShare + 1) * kBits < 8) few_bit_step<kBits, kShare + 1>(a, panel, call, sum);
  }

  // As a constant where it can be one: general registers are as scarce in these loops as vector registers, and GCC
  // would keep what does not fit in vector registers, which takes time from the products.
  template <int kVectors>
  static int64_t step_bytes(const PanelGroup& panels) {
    return kVectors < kCols ? panels.step : kPanel * Dot::kUnit;
  }

  // Where the weights of vector v of one step along k lie, behind the first panel's.
  static int64_t offset_of(const PanelGroup& panels, int v) {
    return v / kCols * panels.stride + v % kCols * kLanes * Dot::kUnit;
  }
  static inline __attribute__((always_inline)) I weights_at(const int8_t* panel, const PanelGroup& panels, int v) {
    return Dot::load_weights(panel + offset_of(panels, v));
  }

  // Weights of element j of each unit, widened to float32. With one row: the dot product with a unit of which that
  // element alone is 1, one instruction. With more, those take all of the multipliers' time: the unit's bits shifted up
  // to the sign and back down.
  template <int kRows, int j>
  static F float_weights(I weights) {
    constexpr int kBits = 32 / Dot::kUnit;
    if constexpr (kRows == 1) return Vec::to_float(Dot::dot(Vec::int_zero(), Vec::int_set(1 << kBits * j), weights));
    return Vec::to_float(Vec::shift_right_signed<32 - kBits>(Vec::shift_left<32 - kBits*(j + 1)>(weights)));
  }

  template <int kRows, int kVectors, int j>
  static inline __attribute__((always_inline)) void float_step(const float* a, int64_t row_stride, const I* weights,
                                                               F (&sum)[kRows][kVectors]) {
    F w[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) w[v] = float_weights<kRows, j>(weights[v]);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F x = Vec::set(a[r * row_stride + j]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = Vec::fma(x, w[v], sum[r][v]);
        pin(sum[r][v]);
      }
    }
    if constexpr (j + 1 < Dot::kUnit) float_step<kRows, kVectors, j + 1>(a, row_stride, weights, sum);
  }

  template <bool kStreams, int kRows, int kVectors>
  static void float_tile_of(const Int8TileCall& call) {
    F sum[kRows][kVectors];
    begin<kStreams>(call, sum);
    const float* a = static_cast<const float*>(call.rows);
    const int64_t row_stride = call.row_stride / static_cast<int64_t>(sizeof(float));
    const int8_t* panel = call.panels.first;
    const char* ahead = call.ahead;
    for (int64_t u = 0; u < call.units; ++u) {
      if constexpr (kStreams) ask<kStreams, kRows>(ahead);
      ahead += call.ahead_step;
      I weights[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) weights[v] = weights_at(panel, call.panels, v);
      float_step<kRows, kVectors, 0>(a + u * Dot::kUnit, row_stride, weights, sum);
      panel += step_bytes<kVectors>(call.panels);
    }
    if (end_of_piece<kStreams>(sum, call)) return;
    alignas(64) float spilled[kRows * kVectors * kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) Vec::store(spilled + (r * kVectors + v) * kLanes, sum[r][v]);
    }
    store_spilled(spilled, kVectors * kLanes, call);
  }

  // From run-time numbers of rows and vectors to the instance compiled for them.
  template <int kBits, bool kStreams>
  struct Instances {
    static constexpr int at_once(int rows) { return kStreams ? 1 : panels_at_once(Dot::kRows, rows); }
    template <int kRows, int kVectors>
    static void run(const Int8TileCall& call) {
      if constexpr (kBits == 8) {
        tile_of<kStreams, kRows, kVectors>(call);
      } else {
        few_bit_tile_of<kBits, kStreams, kRows, kVectors>(call);
      }
    }
  };
  template <bool kStreams>
  struct FloatInstances {
    static constexpr int at_once(int rows) { return kStreams ? 1 : float_panels_at_once(Dot::kRows, rows); }
    template <int kRows, int kVectors>
    static void run(const Int8TileCall& call) {
      float_tile_of<kStreams, kRows, kVectors>(call);
    }
  };

  template <class Of, int kRows = Dot::kRows>
  static void choose_rows(const Int8TileCall& call) {
    if (call.out.rows == kRows) {
      if (call.panels.count > 1) return Of::template run<kRows, Of::at_once(kRows) * kCols>(call);
      return choose_vectors<Of, kRows, kCols>(call);
    }
    if constexpr (kRows > 1) choose_rows<Of, kRows - 1>(call);
  }
  template <class Of, int kRows, int kVectors>
  static void choose_vectors(const Int8TileCall& call) {
    if constexpr (kVectors > 1) {
      if (call.out.cols <= (kVectors - 1) * kLanes) return choose_vectors<Of, kRows, kVectors - 1>(call);
    }
    Of::template run<kRows, kVectors>(call);
  }

  // More rows than a whole panel has registers for: see tile_rows().
  template <int kRows = 2 * Dot::kRows>
  static void choose_many_rows(const Int8TileCall& call) {
    if (call.out.rows == kRows) return choose_vectors<Instances<8, false>, kRows, kCols / 2>(call);
    if constexpr (kRows > Dot::kRows + 1) choose_many_rows<kRows - 1>(call);
  }

  static void tile(const Int8TileCall& call) {
    call.out.rows > Dot::kRows ? choose_many_rows(call) : choose_rows<Instances<8, false>>(call);
  }
  // The more instructions prepare weights, the fewer sums, rows times kCols, hide the latency of the products.
  static constexpr Int8Tiles kTiles = {tile, choose_rows<Instances<8, true>>, 4};
  template <int kBits>
  static constexpr Int8Tiles kFewBitTiles = {choose_rows<Instances<kBits, false>>, choose_rows<Instances<kBits, true>>,
                                             8 / kCols};
  static constexpr Int8Tiles kWeightOnlyTiles = {choose_rows<FloatInstances<false>>, choose_rows<FloatInstances<true>>,
                                                 4 / kCols};

  // ---- epilogue ----
  // Vectors of channels outside, rows inside: what belongs to a channel is read once a tile.

  // The usual cases are done in registers. What is left (16-bit results, activation functions of many instructions,
  // panels side by side of which the last has vectors without channels) goes through a buffer, so that its code is not
  // unrolled for every tile.
  template <int kRows, int kVectors>
  static inline __attribute__((always_inline)) void finish(const I (&sum)[kRows][kVectors], const Int8TileCall& call) {
    const TileOutput& out = call.out;
    const int last = out.cols - (kVectors - 1) * kLanes;  // channels of the last vector
    if (last > 0 && out.type == Result::kInt32) {
      last == kLanes ? store_int32(sum, kLanes, call) : store_int32(sum, last, call);
    } else if (last > 0 && out.type == Result::kFloat32 && call.epilogue.activation <= Activation::kRelu) {
      last == kLanes ? store_float32(sum, kLanes, call) : store_float32(sum, last, call);
    } else {
      alignas(64) int32_t spilled[kRows * kVectors * kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) Vec::store_int(spilled + (r * kVectors + v) * kLanes, sum[r][v]);
      }
      store_spilled(spilled, kVectors * kLanes, call);
    }
  }

  template <int kRows, int kVectors>
  static inline __attribute__((always_inline)) void store_int32(const I (&sum)[kRows][kVectors], int last,
                                                                const Int8TileCall& call) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int n = v == kVectors - 1 ? last : kLanes;
      const I off = correction(call.epilogue, v * kLanes, n);
      int32_t* y = static_cast<int32_t*>(call.out.y) + v * kLanes;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) store_integers(y + r * call.out.y_stride, Vec::int_sub(sum[r][v], off), n);
    }
  }

  template <int kRows, int kVectors>
  static inline __attribute__((always_inline)) void store_float32(const I (&sum)[kRows][kVectors], int last,
                                                                  const Int8TileCall& call) {
    const F floor = Vec::set(call.epilogue.activation == Activation::kRelu ? 0.0F : -__builtin_inff());
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int n = v == kVectors - 1 ? last : kLanes;
      const I off = correction(call.epilogue, v * kLanes, n);
      const Channels c = channels_at(call.epilogue, v * kLanes, n);
      float* y = static_cast<float*>(call.out.y) + v * kLanes;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const F y_r = scaled(Vec::to_float(Vec::int_sub(sum[r][v], off)), call.row_scale[r], c);
        store(y + r * call.out.y_stride, Vec::at_least(floor, y_r), n);
      }
    }
  }
};

static_assert((Loops::kPanel & (Loops::kPanel - 1)) == 0 && (Dot::kUnit & (Dot::kUnit - 1)) == 0);
constexpr Int8Tile kTile = {Dot::kRows, Loops::kPanel, Loops::kLanes, Dot::kUnit, sizeof(Dot::Prepared), Dot::kOffset};

}  // namespace
}  // namespace kdq
