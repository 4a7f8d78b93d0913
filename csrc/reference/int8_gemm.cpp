// The specification of the int8 family: one row, one channel, one product at a time. Its "tile" is a single row and its
// panel a single channel, so packed weights are simply row-major.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "core/int8_gemm_kernels.h"
#include "reference/int8_epilogue.h"
#include "reference/scalar.h"

namespace kdq {
namespace {

using reference::load;

struct Loops {
  static constexpr int64_t kAheadStep = 0;

  // body(x, row, r) for each row.
  template <class T, class Prepared, class Body>
  static void for_each_row(const Int8RowsCall& call, Body body) {
    for (int r = 0; r < call.count; ++r) {
      body(static_cast<const T*>(call.x) + r * call.k,
           reinterpret_cast<Prepared*>(static_cast<char*>(call.rows) + r * call.stride), r);
    }
  }

  static void prepare_int8(const Int8RowsCall& call) {
    for_each_row<int8_t, int16_t>(call, [&](const int8_t* a, int16_t* row, int) { std::copy(a, a + call.k, row); });
  }

  template <class T>
  static void prepare_dynamic(const Int8RowsCall& call) {
    for_each_row<T, int16_t>(
        call, [&](const T* x, int16_t* row, int r) { call.scales[r] = prepare_dynamic_row(x, call.k, row); });
  }
  template <class T>
  static void row_scales(const void* x, int rows, int64_t k, float* scales) {
    for (int r = 0; r < rows; ++r) scales[r] = row_scale(static_cast<const T*>(x) + r * k, k);
  }
  template <class T>
  static float row_scale(const T* x, int64_t k) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < k; ++i) largest = std::max(largest, reference::bits_of(std::fabs(load(x + i))));
    const float scale = reference::float_of(largest) / 127.0F;
    return scale < FLT_MIN ? FLT_MIN : scale;
  }
  template <class T>
  static float prepare_dynamic_row(const T* in, int64_t k, int16_t* out) {
    const float scale = row_scale(in, k);
    const float inverse = 1.0F / scale;
    for (int64_t i = 0; i < k; ++i) {
      const float q = std::min(std::max(std::nearbyint(load(in + i) * inverse), -127.0F), 127.0F);
      out[i] = std::isfinite(scale) ? static_cast<int16_t>(q) : int16_t{0};
    }
    return std::isfinite(scale) ? scale : NAN;
  }

  template <class T>
  static void prepare_static(const Int8RowsCall& call, const StaticGrid& grid, float scale) {
    for_each_row<T, int16_t>(call, [&](const T* x, int16_t* row, int r) {
      bool has_nan = false;
      for (int64_t i = 0; i < call.k; ++i) {
        const float value = load(x + i);
        has_nan = has_nan || std::isnan(value);
        row[i] = static_cast<int16_t>(reference::quantize(value, grid));
      }
      call.scales[r] = has_nan ? NAN : scale;
    });
  }

  template <class T>
  static void widen(const Int8RowsCall& call) {
    for_each_row<T, float>(call, [&](const T* x, float* row, int) {
      for (int64_t i = 0; i < call.k; ++i) row[i] = load(x + i);
    });
  }

  static void tile(const Int8TileCall& call) {
    product(call, [&](int64_t i) { return call.panels.first[i]; });
  }
  template <int kBits>
  static void few_bit_tile(const Int8TileCall& call) {
    constexpr int64_t kShares = 8 / kBits;
    product(call, [&](int64_t i) {
      const auto byte = static_cast<unsigned>(call.panels.first[i / kShares]);
      return static_cast<int8_t>(byte << (8 - kBits * (i % kShares + 1)) & static_cast<unsigned>(top_bits(kBits)));
    });
  }
  // weight(i): of k = i.
  template <class Weight>
  static void product(const Int8TileCall& call, Weight weight) {
    const int16_t* a = static_cast<const int16_t*>(call.rows);
    uint32_t sum = 0;  // wraps like the vector instructions do
    for (int64_t i = 0; i < call.units; ++i) sum += static_cast<uint32_t>(a[i] * weight(i));
    const float row_scale = call.row_scale == nullptr ? 0.0F : *call.row_scale;
    reference::store_exact(sum, row_scale, call.epilogue, 0, call.out);
  }

  static void weight_only_tile(const Int8TileCall& call) {
    const float* a = static_cast<const float*>(call.rows);
    float sum = 0.0F;
    for (int64_t i = 0; i < call.units; ++i) sum += a[i] * static_cast<float>(call.panels.first[i]);
    reference::store_scaled(sum, *call.row_scale, call.epilogue, 0, call.out);
  }

  static constexpr Int8Tiles kTiles = {tile, nullptr, 0};
  template <int kBits>
  static constexpr Int8Tiles kFewBitTiles = {few_bit_tile<kBits>, nullptr, 0};
  static constexpr Int8Tiles kWeightOnlyTiles = {weight_only_tile, nullptr, 0};
};

}  // namespace

const Int8Kernels kInt8Reference = make_int8_kernels<Loops>({1, 1, 1, 1, 2, 0});

}  // namespace kdq
