// What the float loops of all families share: whole vectors, then one partial vector. Included after a vec_*.h.
#pragma once

#include <stdint.h>

#include "core/tile_output.h"

namespace kdq {
namespace {

// body(i, n): elements i ... i + n - 1, n = Vec::kLanes but for the last call. Inlined twice, so that n is a constant
// in the loop and the tests on it vanish.
template <class Body>
inline __attribute__((always_inline)) void for_each_vector(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) body(i, Vec::kLanes);
  if (i < count) body(i, static_cast<int>(count - i));
}

template <class T>
inline __attribute__((always_inline)) Vec::Float load(const T* p, int n) {
  return n == Vec::kLanes ? Vec::load(p) : Vec::load_part(p, n);
}

inline __attribute__((always_inline)) Vec::Int load_int(const int32_t* p, int n) {
  return n == Vec::kLanes ? Vec::int_load(p) : Vec::int_load_part(p, n);
}

template <class T>
inline __attribute__((always_inline)) void store(T* p, Vec::Float v, int n) {
  if (n == Vec::kLanes) {
    Vec::store(p, v);
  } else {
    Vec::store_part(p, v, n);
  }
}

// As store(), or past the caches where a whole vector goes to an address aligned to its size.
template <bool kStream, class T>
inline __attribute__((always_inline)) void put(T* p, Vec::Float v, int n) {
  if (kStream && n == Vec::kLanes) {
    Vec::stream(p, v);
  } else {
    store(p, v, n);
  }
}

// The same for a pair of vectors.
template <bool kStream, class T>
inline __attribute__((always_inline)) void put_pair(T* p, Vec::Pair v) {
  if (kStream) {
    Vec::stream_pair(p, v);
  } else {
    Vec::store_pair(p, v);
  }
}

// Asks for what a loop that reads memory and writes past the caches will read 4 KiB from p on, where p has count
// elements: the CPU's own prefetching starts anew in every page. Worth a tenth on Zen 4; on Zen 5 nothing, and 2 KiB
// cost 4 %.
template <class T>
inline __attribute__((always_inline)) void prefetch_ahead(const T* p, int count) {
  constexpr int64_t kAhead = 4096;
  const char* bytes = reinterpret_cast<const char*>(p) + kAhead;
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += kLine) _mm_prefetch(bytes + i, _MM_HINT_T0);
}

template <class T>
inline __attribute__((always_inline)) void store_integers(T* p, Vec::Int v, int n) {
  if (n == Vec::kLanes) {
    Vec::store_int(p, v);
  } else {
    Vec::store_int_part(p, v, n);
  }
}

// add(r, v, activation(r), weight(v)) for a tile's rows r and vectors v. Of activations and weights, the fewer are made
// first and stay in registers: all of both would leave none for the sums, and compilers move these to memory.
template <class Vector, int kRows, int kVectors, class Activation, class Weight, class Add>
inline __attribute__((always_inline)) void for_each_product(Activation activation, Weight weight, Add add) {
  if constexpr (kRows <= kVectors) {
    Vector x[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) x[r] = activation(r);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const Vector w = weight(v);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) add(r, v, x[r], w);
    }
  } else {
    Vector w[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) w[v] = weight(v);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector x = activation(r);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) add(r, v, x, w[v]);
    }
  }
}

// Says that a running sum changes here, in a register. Compilers otherwise gather the work of several rows before they
// add it up, run out of registers, and keep sums in memory.
template <class Vector>
inline __attribute__((always_inline)) void pin(Vector& sum) {
  __asm__("" : "+v"(sum));
}

// Asks for the cache lines that a tile will write, so that they arrive while its sums are made: stores wait in order,
// and rows that lie a multiple of 4 KiB apart miss all caches at once. Worth 5 % of a 1024 x 1024 x 1024 product, if
// asked for some hundred cycles before they are written: by the end of a long tile, its panel has driven them out of
// L1 again. Where the lines are near anyway, the instructions cost 1 to 2 %.
inline void prefetch_output(const TileOutput& out) {
  if (out.place == Place::kNear) return;
  for (int r = 0; r < out.rows; ++r) {
    const char* row = static_cast<const char*>(out.y) + r * out.y_stride * out.element_bytes;
    for (int64_t i = 0; i < out.cols * out.element_bytes; i += 64) __asm__ volatile("prefetchw %0" ::"m"(row[i]));
  }
}

constexpr float kFloatMin = 1.17549435e-38F;
constexpr float kFloatMax = 3.40282347e+38F;

// bits: of max|x|.
inline float scale_of(int32_t bits) {
  float magnitude = 0;
  memcpy(&magnitude, &bits, sizeof(magnitude));
  const float scale = magnitude / 127.0F;
  return scale < kFloatMin ? kFloatMin : scale;
}

// The scale of dynamic symmetric quantization: max(max|x| / 127, FLT_MIN), NaN or inf if x has such values. Without
// their sign bit, float32 patterns order as integers do, and NaN > inf > finite.
template <class T>
float symmetric_scale(const T* x, int64_t count) {
  constexpr int kChains = 4;  // of maxima: one would wait for each before the next
  constexpr int kStep = kChains * Vec::kLanes;
  Vec::Int largest[kChains];
  for (Vec::Int& chain : largest) chain = Vec::int_zero();
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      largest[j] = Vec::int_max(largest[j], Vec::as_int(Vec::abs(load(x + i + j * Vec::kLanes, Vec::kLanes))));
    }
  }
  for_each_vector(count - i, [&](int64_t j, int n) __attribute__((always_inline)) {
    largest[0] = Vec::int_max(largest[0], Vec::as_int(Vec::abs(load(x + i + j, n))));
  });
  const int32_t bits =
      Vec::max_lane(Vec::int_max(Vec::int_max(largest[0], largest[1]), Vec::int_max(largest[2], largest[3])));
  return scale_of(bits);
}

// The same of several rows, one behind the other: four at once, so that the steps from a row's maximum to its scale do
// not wait for each other. Not of long rows, which are to be read again from L1.
template <class T>
void symmetric_scales(const T* x, int rows, int64_t count, float* scales) {
  constexpr int kTogether = 4;
  constexpr int64_t kMostBytes = 16 * 1024;
  const bool is_long = count * kTogether * static_cast<int64_t>(sizeof(T)) > kMostBytes;
  int r = 0;
  for (; !is_long && r + kTogether <= rows; r += kTogether) {
    const T* first = x + r * count;
    Vec::Int largest[kTogether];
    for (Vec::Int& row : largest) row = Vec::int_zero();
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) {
        largest[j] = Vec::int_max(largest[j], Vec::as_int(Vec::abs(load(first + j * count + i, n))));
      }
    });
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; ++j) scales[r + j] = scale_of(Vec::max_lane(largest[j]));
  }
  for (; r < rows; ++r) scales[r] = symmetric_scale(x + r * count, count);
}

// clamp(round(x * inverse), -127, 127)
inline Vec::Float symmetric127(Vec::Float x, Vec::Float inverse) {
  return Vec::at_most(Vec::set(127.0F), Vec::at_least(Vec::set(-127.0F), Vec::round(Vec::mul(x, inverse))));
}

}  // namespace
}  // namespace kdq
