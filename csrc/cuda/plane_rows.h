// Rows of integers as bit planes on a GPU: packing, unpacking, quantization, sums. A thread makes or reads the same
// byte of every plane of a row, eight integers.
#pragma once

#include "core/plane_forms.h"
#include "cuda/quantize_rows.h"
#include "cuda/signs.h"

namespace kdq::cuda {

inline int64_t plane_row_bytes(int64_t k) { return binary_words(k) * static_cast<int64_t>(sizeof(uint64_t)); }

// A matrix of planes in memory, byte by byte.
struct PlaneBytes {
  uint8_t* data;
  int64_t rows;
  int64_t row_bytes;
  int bits;

  KDQ_DEVICE uint8_t* at(int plane, int64_t row, int64_t byte) const {
    return data + (plane * rows + row) * row_bytes + byte;
  }

  // codes: of eight elements.
  template <class Thread>
  KDQ_DEVICE void store(Thread& thread, int64_t row, int64_t byte, const uint32_t (&codes)[kByte]) const {
    for (int p = 0; p < bits; ++p) {
      uint32_t plane = 0;
      for (int e = 0; e < kByte; ++e) plane |= (codes[e] >> p & 1U) << e;
      thread.store(at(p, row, byte), static_cast<uint8_t>(plane));
    }
  }
};

// q: int8, or uint8. Of integers that are none of the form, the lower bits of a code count.
struct PackPlanes {
  static constexpr int kThreads = 256;
  struct Shared {};

  const uint8_t* q;
  PlaneBytes planes;
  int64_t k;
  PlaneCodes codes;
  bool is_signed;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t own = thread.block() * kThreads + thread.index();
    const int64_t row = own / planes.row_bytes;
    if (row >= planes.rows) return;
    const int64_t byte = own - row * planes.row_bytes;
    uint32_t eight[kByte] = {};
    for (int e = 0; e < kByte; ++e) {
      const int64_t i = byte * kByte + e;
      if (i >= k) continue;
      const uint8_t raw = thread.load(q + row * k + i);
      const int value = is_signed ? static_cast<int8_t>(raw) : raw;
      eight[e] = static_cast<uint32_t>((value - codes.offset) / codes.factor);
    }
    planes.store(thread, row, byte, eight);
  }
};

struct UnpackPlanes {
  static constexpr int kThreads = 256;
  struct Shared {};

  PlaneBytes planes;
  uint8_t* q;
  int64_t k;
  PlaneCodes codes;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t own = thread.block() * kThreads + thread.index();
    const int64_t row = own / planes.row_bytes;
    if (row >= planes.rows) return;
    const int64_t byte = own - row * planes.row_bytes;
    if (byte * kByte >= k) return;
    uint32_t eight[kByte] = {};
    for (int p = 0; p < planes.bits; ++p) {
      const uint32_t plane = thread.load(static_cast<const uint8_t*>(planes.at(p, row, byte)));
      for (int e = 0; e < kByte; ++e) eight[e] |= (plane >> e & 1U) << p;
    }
    for (int e = 0; e < kByte && byte * kByte + e < k; ++e) {
      const int value = codes.factor * static_cast<int>(eight[e]) + codes.offset;
      thread.store(q + row * k + byte * kByte + e, static_cast<uint8_t>(value));
    }
  }
};

// The sum of each row's integers, modulo 2^32. A warp a row.
struct SumPlanes {
  static constexpr int kThreads = 256;
  static constexpr int kRows = kThreads / kWarp;
  struct Shared {};

  const uint32_t* planes;
  int64_t rows;
  int64_t row_words;  // of 32 bits
  int64_t k;
  int bits;
  PlaneCodes codes;
  int32_t* sum;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t row = thread.block() * kRows + thread.index() / kWarp;
    if (row >= rows) return;  // the whole warp
    uint32_t own = 0;
    for (int p = 0; p < bits; ++p) {
      const uint32_t* from = planes + (p * rows + row) * row_words;
      for (int64_t w = thread.index() % kWarp; w < row_words; w += kWarp) {
        own += static_cast<uint32_t>(thread.popcount(thread.load(from + w))) << p;
      }
    }
    own = reduce_warp(thread, own, Sum());
    const uint32_t value =
        static_cast<uint32_t>(codes.factor) * own + static_cast<uint32_t>(codes.offset) * static_cast<uint32_t>(k);
    if (thread.index() % kWarp == 0) thread.store(sum + row, static_cast<int32_t>(value));
  }
};

// x -> the planes of clamp(nearbyint(x / scale) + zero_point, 0, quant_max), their sum, and the scale of each row: that
// of the grid, or NaN where a row has one.
template <class T, int kTeam>
struct QuantizePlanes {
  using Team = RowTeam<T, kTeam>;
  static constexpr int kThreads = Team::kThreads;
  static constexpr int kRows = Team::kRows;
  struct Shared {
    uint32_t has_nan[kThreads / kWarp];
    uint32_t sum[kThreads / kWarp];
  };

  const T* x;
  PlaneBytes planes;
  int32_t* sum;
  float* scale;
  int64_t k;
  bool wide;  // rows of x are multiples of 16
  StaticGrid grid;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t row = Team::row(thread);
    if (row >= planes.rows) return;
    const float s = grid.scale_in(thread);
    const float inverse = 1.0F / s;
    const float zero_point = static_cast<float>(grid.zero_point_in(thread));
    uint32_t has_nan = 0;
    uint32_t own = 0;
    for (int64_t byte = thread.index() % kTeam; byte < planes.row_bytes; byte += kTeam) {
      uint32_t codes[kByte] = {};
#pragma unroll
      for (int c = 0; c < kByte; c += kChunk<T>) {
        const int64_t i = byte * kByte + c;
        float values[kChunk<T>];
        load_chunk(thread, x + row * k + i, wide, k - i, values);
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e) {
          if (i + e >= k) continue;
          has_nan |= is_nan(values[e]) ? 1U : 0U;
          codes[c + e] =
              static_cast<uint32_t>(static_integer(values[e], inverse, zero_point, grid.quant_max) + kStaticShift);
          own += codes[c + e];
        }
      }
      planes.store(thread, row, byte, codes);
    }
    has_nan = Team::reduce(thread, shared.has_nan, has_nan, Largest());
    own = Team::reduce(thread, shared.sum, own, Sum());
    if (thread.index() % kTeam != 0) return;
    thread.store(scale + row, has_nan != 0 ? NAN : s);
    thread.store(sum + row, static_cast<int32_t>(own));
  }
};

// ---- for launching -------------------------------------------------------------------------------------------------

inline PlaneBytes plane_bytes_of(const void* planes, int64_t rows, int64_t k, int bits) {
  return {static_cast<uint8_t*>(const_cast<void*>(planes)), rows, plane_row_bytes(k), bits};
}

inline Status check_plane_rows(int64_t rows, int64_t k, int bits, PlaneForm form, const void* planes, const void* q) {
  Status status = check_binary_sizes(rows, 0, k);
  if (status.ok()) status = check_plane_count("bits", bits, form);
  if (status.ok()) status = check_pointer("q", q, rows * k);
  return status.ok() ? check_pointer("planes", planes, rows * k) : status;
}

template <class Launcher>
Status launch_pack_bitplanes(const Launcher& launcher, const void* q, int64_t rows, int64_t k, int bits, PlaneForm form,
                             uint64_t* planes) {
  const Status status = check_plane_rows(rows, k, bits, form, planes, q);
  if (!status.ok()) return status;
  const PlaneBytes to = plane_bytes_of(planes, rows, k, bits);
  const PackPlanes kernel = {static_cast<const uint8_t*>(q), to, k, PlaneCodes(bits, form),
                             form != PlaneForm::kUnsigned};
  return launcher.run(kernel, ceil_div(rows * to.row_bytes, kernel.kThreads));
}

template <class Launcher>
Status launch_unpack_bitplanes(const Launcher& launcher, const uint64_t* planes, int64_t rows, int64_t k, int bits,
                               PlaneForm form, void* q) {
  const Status status = check_plane_rows(rows, k, bits, form, planes, q);
  if (!status.ok()) return status;
  const PlaneBytes from = plane_bytes_of(planes, rows, k, bits);
  const UnpackPlanes kernel = {from, static_cast<uint8_t*>(q), k, PlaneCodes(bits, form)};
  return launcher.run(kernel, ceil_div(rows * from.row_bytes, kernel.kThreads));
}

// sum: [a.rows].
template <class Launcher>
Status launch_sum_planes(const Launcher& launcher, const PlaneMatrix& a, int64_t k, int32_t* sum) {
  const SumPlanes kernel = {reinterpret_cast<const uint32_t*>(a.planes),
                            a.rows,
                            plane_row_bytes(k) / 4,
                            k,
                            a.bits,
                            PlaneCodes(a.bits, a.form),
                            sum};
  return launcher.run(kernel, ceil_div(a.rows, kernel.kRows));
}

template <class Launcher>
Status launch_quantize_planes(const Launcher& launcher, DType dtype, const void* x, int64_t k, const StaticGrid& grid,
                              const PlaneBytes& planes, int32_t* sum, float* scale) {
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return with_row_team(k, [&](auto team) {
      const bool wide = is_aligned(x, 16) && k % kChunk<T> == 0;
      const QuantizePlanes<T, team.value> kernel = {static_cast<const T*>(x), planes, sum, scale, k, wide, grid};
      return launcher.run(kernel, ceil_div(planes.rows, kernel.kRows));
    });
  });
}

}  // namespace kdq::cuda
