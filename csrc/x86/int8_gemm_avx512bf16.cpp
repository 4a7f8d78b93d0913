// The weight-only product of bfloat16 rows on AVX-512 BF16: vdpbf16ps adds two products to a float32 sum and rounds
// after each; numbers below FLT_MIN count as 0, in operands and sums.
#include "x86/vec_avx512.h"

#include "x86/int8_epilogue_simd.h"

namespace kdq {
namespace {

// Byte j of each lane, as float32: vpdpbusd, with 1 for that byte and 0 for the others, is the quickest way to pick and
// sign-extend it.
template <int j>
Vec::Int float_bits(Vec::Int weights) {
  const Vec::Int picked = _mm512_dpbusd_epi32(Vec::int_zero(), Vec::int_set(1 << 8 * j), weights);
  return Vec::as_int(Vec::to_float(picked));
}

// Bytes 2 half and 2 half + 1 of each lane, as bfloat16: the upper halves of float32, which int8 values do not exceed.
template <int half>
Vec::Int widened(Vec::Int weights) {
  const Vec::Int upper_halves = _mm512_set_epi16(63, 31, 61, 29, 59, 27, 57, 25, 55, 23, 53, 21, 51, 19, 49, 17, 47, 15,
                                                 45, 13, 43, 11, 41, 9, 39, 7, 37, 5, 35, 3, 33, 1);
  return _mm512_permutex2var_epi16(float_bits<2 * half>(weights), upper_halves, float_bits<2 * half + 1>(weights));
}

constexpr int64_t kVectorBytes = 64;

// Where a tile's weights come from: a unit is 4 consecutive k of so many vectors of channels, and has two halves.
struct Packed {
  static constexpr int kUnitVectors = 1;  // for a vector of channels
  template <int half, int kVectors>
  static Vec::Int weights_at(const int8_t* unit, int v) {
    return widened<half>(_mm512_loadu_si512(unit + v * kVectorBytes));
  }
  // What lies 16 KiB on: weights from memory arrive 1.3 to 1.9 times as fast, those from L3 no later than without.
  template <int kVectors>
  static void ask_ahead(const int8_t* unit, const char*) {
    constexpr int64_t kAhead = 16 * 1024;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm_prefetch(unit + kAhead + v * kVectorBytes, _MM_HINT_T0);
  }
};
struct Widened {
  static constexpr int kUnitVectors = 2;
  template <int half, int kVectors>
  static Vec::Int weights_at(const int8_t* unit, int v) {
    return _mm512_load_si512(unit + (half * kVectors + v) * kVectorBytes);
  }
  template <int kVectors>
  static void ask_ahead(const int8_t*, const char* ahead) {
    _mm_prefetch(ahead, _MM_HINT_T1);
    _mm_prefetch(ahead + kLine, _MM_HINT_T1);
  }
};

struct Loops {
  static constexpr int kLanes = Vec::kLanes;
  // 24 sums, 4 vectors of weights, 1 broadcast: 29 of 32 registers.
  static constexpr int kRows = 6;
  static constexpr int kCols = 4;
  static constexpr int64_t kOutputSteps = 16;  // before a tile's last step its output is asked for

  static void widen_panel(const int8_t* panel, int64_t bytes, int64_t step, int8_t* to) {
    for (const int8_t* end = panel + bytes; panel < end; panel += step, to += 2 * step) {
      for (int64_t i = 0; i < step; i += kVectorBytes) {
        const Vec::Int weights = _mm512_loadu_si512(panel + i);
        _mm512_store_si512(to + i, widened<0>(weights));
        _mm512_store_si512(to + step + i, widened<1>(weights));
      }
    }
  }

  template <class Source, int half, int kTileRows, int kVectors>
  static inline __attribute__((always_inline)) void half_step(const char* rows, int64_t row_stride, const int8_t* unit,
                                                              Vec::Float (&sum)[kTileRows][kVectors]) {
    Vec::Int weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = Source::template weights_at<half, kVectors>(unit, v);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      int32_t pair = 0;
      memcpy(&pair, rows + r * row_stride + 4 * half, sizeof(pair));
      const Vec::Int x = Vec::int_set(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)x, (__m512bh)weights[v]);
        pin(sum[r][v]);
      }
    }
  }

  template <class Source, int kTileRows, int kVectors>
  static void tile_of(const Int8TileCall& call) {
    Vec::Float sum[kTileRows][kVectors];
#pragma GCC unroll 32
    for (int i = 0; i < kTileRows * kVectors; ++i) sum[i / kVectors][i % kVectors] = Vec::zero();
    const char* rows = static_cast<const char*>(call.rows);
    const int8_t* unit = call.panels.first;
    const char* ahead = call.ahead;
    const int64_t last_steps = call.out.place == Place::kNear ? 0 : kOutputSteps;
    int64_t u = 0;
    for (int64_t end = call.units > last_steps ? call.units - last_steps : 0;; end = call.units) {
      for (; u < end; ++u, rows += 8, unit += Source::kUnitVectors * kVectors * kVectorBytes) {
        Source::template ask_ahead<kVectors>(unit, ahead);
        ahead += call.ahead_step;
        half_step<Source, 0>(rows, call.row_stride, unit, sum);
        half_step<Source, 1>(rows, call.row_stride, unit, sum);
      }
      if (u == call.units) break;
      prefetch_output(call.out);
    }
    alignas(64) float spilled[kTileRows * kVectors * kLanes];
#pragma GCC unroll 32
    for (int i = 0; i < kTileRows * kVectors; ++i) Vec::store(spilled + i * kLanes, sum[i / kVectors][i % kVectors]);
    store_spilled(spilled, kVectors * kLanes, call);
  }

  // From run-time numbers of rows and vectors to the instance compiled for them.
  template <class Source, int kTileRows = kRows>
  static void tile(const Int8TileCall& call) {
    if (call.out.rows == kTileRows) return choose_vectors<Source, kTileRows>(call);
    if constexpr (kTileRows > 1) tile<Source, kTileRows - 1>(call);
  }
  template <class Source, int kTileRows, int kVectors = kCols>
  static void choose_vectors(const Int8TileCall& call) {
    if (call.panels.step == kVectors * kVectorBytes) return tile_of<Source, kTileRows, kVectors>(call);
    if constexpr (kVectors > 1) choose_vectors<Source, kTileRows, kVectors - 1>(call);
  }
};

}  // namespace

extern const Int8Bf16Kernels kInt8Avx512Bf16 = {Loops::kRows, Loops::widen_panel, Loops::tile<Packed>,
                                                Loops::tile<Widened>};

}  // namespace kdq
