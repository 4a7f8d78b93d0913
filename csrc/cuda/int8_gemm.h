// int8_matmul and int8_linear on a GPU: what the tiled product makes of int8, and what becomes of its sums.
#pragma once

#include "core/checks.h"
#include "cuda/linear_output.h"
#include "cuda/quantize_rows.h"
#include "cuda/small_product.h"

namespace kdq::cuda {

// Static activations: a holds q - kStaticShift, and the zero point's share of a sum is known from the column.
struct StaticInt8Product {
  static constexpr bool kCounts = true;
  StaticGrid grid;

  template <class Thread>
  static KDQ_DEVICE void mma(Thread& thread, int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    thread.mma_int8(c, a, b);
  }
  template <class Thread, class Sums>
  static KDQ_DEVICE void wgmma(Thread& thread, Sums& sums, uint64_t a, uint64_t b, bool accumulate) {
    thread.wgmma_int8(sums, a, b, accumulate);
  }
  template <class Thread>
  static KDQ_DEVICE uint32_t count(Thread& thread, uint32_t word) {
    return static_cast<uint32_t>(thread.byte_sum(word));
  }
  // Unsigned steps wrap; the result fits.
  template <class Thread>
  KDQ_DEVICE int32_t result(Thread& thread, int32_t sum, uint32_t, uint32_t of_b) const {
    const auto offset = static_cast<uint32_t>(kStaticShift - grid.zero_point_in(thread));
    return static_cast<int32_t>(static_cast<uint32_t>(sum) + offset * of_b);
  }
};

// Exact sums to floats.
struct ScaledOutput {
  static constexpr bool kBits = false;
  LinearOutput to;
  const float* row_scale;

  template <class Thread>
  KDQ_DEVICE void store(Thread& thread, int64_t row, int64_t col, int32_t sum) const {
    to.store(thread, row, col, static_cast<float>(sum), thread.load(row_scale + row));
  }
  template <class Thread>
  KDQ_DEVICE float row(Thread& thread, int64_t row) const {
    return thread.load(row_scale + row);
  }
  template <class Thread>
  KDQ_DEVICE LinearOutput::Column column(Thread& thread, int64_t col) const {
    return to.column(thread, col);
  }
  template <class Thread>
  KDQ_DEVICE float value(Thread& thread, float scale, const LinearOutput::Column& column, int32_t sum) const {
    return to.value(thread, scale, column, static_cast<float>(sum));
  }
  template <class Body>
  KDQ_DEVICE void with_elements(const Body& body) const {
    to.with_elements(body);
  }
};

inline Status check_product(int64_t m, int64_t n, int64_t k, int64_t max_k = kInt8MaxK) {
  if (m < 0 || n < 0 || k < 0) return Status::invalid("m, n, k: expected sizes of at least 0");
  if (k > max_k) {
    return Status::invalid("k: " + std::to_string(k) + " would overflow int32 sums; expected at most " +
                           std::to_string(max_k));
  }
  return {};
}

// partial: partial_bytes(m, n, k), or nullptr.
template <class Launcher>
Status launch_int8_matmul(const Launcher& launcher, const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k,
                          int32_t* out, void* partial) {
  Status status = check_product(m, n, k);
  if (status.ok()) status = check_pointer("a", a, m * k);
  if (status.ok()) status = check_pointer("b", b, n * k);
  if (status.ok()) status = check_pointer("out", out, m * n);
  if (!status.ok()) return status;
  return launch_product(launcher, Int8Product(), operand_of(a, m, k), operand_of(b, n, k), Int32Output{out, n},
                        static_cast<int32_t*>(partial));
}

// Row scales, then quantized rows, then results of pieces of k.
inline size_t linear_scale_bytes(int64_t m) { return static_cast<size_t>(ceil_div(m * 4, 16) * 16); }
inline size_t linear_partial_offset(int64_t m, int64_t k) {
  return linear_scale_bytes(m) + static_cast<size_t>(ceil_div(m * k, 16) * 16);
}
inline size_t linear_workspace_bytes(int64_t m, int64_t n, int64_t k) {
  return linear_partial_offset(m, k) + partial_bytes(m, n, k);
}

// Of static activations.
inline Status check_input_grid(const Int8Linear& args) {
  if (!args.is_static) return {};
  return check_static_grid(args.input_scale_at == nullptr ? &args.input_scale : nullptr,
                           args.input_zero_point_at == nullptr ? &args.input_zero_point : nullptr,
                           args.input_quant_max);
}
inline StaticGrid input_grid(const Int8Linear& args) {
  return {args.input_scale_at, args.input_scale, args.input_zero_point_at, args.input_zero_point,
          static_cast<float>(args.input_quant_max)};
}

inline Status check_int8_linear(const Int8Linear& args) {
  Status status = check_product(args.m, args.n, args.k, args.is_static ? kInt8StaticMaxK : kInt8MaxK);
  if (status.ok()) status = check_input_grid(args);
  if (status.ok()) status = check_linear_pointers(args);
  if (status.ok()) status = check_pointer("workspace", args.workspace, args.m);
  return status;
}

template <class Launcher>
Status launch_int8_linear(const Launcher& launcher, const Int8Linear& args) {
  Status status = check_int8_linear(args);
  if (!status.ok() || args.m * args.n == 0) return status;
  char* workspace = static_cast<char*>(args.workspace);
  float* scale = reinterpret_cast<float*>(workspace);
  int8_t* q = reinterpret_cast<int8_t*>(workspace + linear_scale_bytes(args.m));
  int32_t* partial = reinterpret_cast<int32_t*>(workspace + linear_partial_offset(args.m, args.k));
  const Operand rows = operand_of(q, args.m, args.k);
  const Operand weight = operand_of(args.weight, args.n, args.k);
  const ScaledOutput output = {linear_output(args), scale};
  if (!args.is_static) {
    status = launch_quantize_rows(launcher, args.dtype, args.x, args.m, args.k, q, scale);
    return status.ok() ? launch_product(launcher, Int8Product(), rows, weight, output, partial) : status;
  }
  const StaticGrid grid = input_grid(args);
  status = launch_quantize_rows_static(launcher, args.dtype, args.x, args.m, args.k, grid, q, scale);
  return status.ok() ? launch_product(launcher, StaticInt8Product{grid}, rows, weight, output, partial) : status;
}

}  // namespace kdq::cuda
