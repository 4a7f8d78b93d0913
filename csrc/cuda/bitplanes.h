// Products of bit planes on a GPU: the tiled product of the binary family, which runs over k once for each pair of
// planes and doubles its sums in between.
//
// Tensor cores count the bits that are set in both: A = sum of 2^(p + q) popcount(a_p and b_q) is the sum of products
// of codes, and with integers d code + z (kdq/bitplanes.h)
//   a.b = d_a d_b A + z_b sum(a) + z_a sum(b) - K z_a z_b.
#pragma once

#include "core/binary_gemm_kernels.h"
#include "cuda/int8_gemm.h"
#include "cuda/plane_rows.h"

namespace kdq::cuda {

constexpr int kMostPasses = kMostPlanes * kMostPlanes;

// A matrix of planes as the rows of a product: a row is one plane after the other, in the order of the passes, each
// filled up with zeros to whole steps.
struct PlaneRows {
  static constexpr bool kPasses = true;
  Operand planes;  // [bits * rows, row bytes]
  int64_t rows;
  int64_t row_bytes;    // of all passes
  uint32_t pass_bytes;  // a multiple of a step
  uint8_t plane[kMostPasses];
  bool doubles[kMostPasses];

  using Row = int64_t;
  KDQ_DEVICE Row row_at(int64_t row) const { return row; }

  template <class Thread>
  KDQ_DEVICE Words<16> piece(Thread& thread, int64_t row, int64_t byte, int64_t end) const {
    if (row >= rows || byte >= end) return {};
    const uint32_t pass = static_cast<uint32_t>(byte) / pass_bytes;
    const int64_t at = static_cast<uint32_t>(byte) - pass * pass_bytes;
    return planes.piece(thread, plane[pass] * rows + row, at, planes.row_bytes);
  }

  // Whether sums are doubled before the step at `byte`.
  KDQ_DEVICE bool doubles_at(int64_t byte) const {
    const uint32_t pass = static_cast<uint32_t>(byte) / pass_bytes;
    return pass * pass_bytes == static_cast<uint32_t>(byte) && doubles[pass];
  }
};

struct PlaneProduct {
  static constexpr bool kCounts = false;
  template <class Thread>
  static KDQ_DEVICE void mma(Thread& thread, int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    thread.mma_and(c, a, b);
  }
  template <class Thread>
  KDQ_DEVICE int32_t result(Thread&, int32_t sum, uint32_t, uint32_t) const {
    return sum;
  }
};

// From products of codes to those of integers, less the zero point's share, and on to what they become in `To`:
// Int32Output or ScaledOutput. Unsigned steps wrap; the results fit.
template <class To>
struct PlaneOutput {
  static constexpr bool kBits = false;
  To to;
  int64_t cols;
  const int32_t* row_sum;
  const int32_t* column_sum;
  int32_t factor;         // of the product of codes
  int32_t row_factor;     // of row_sum
  int32_t column_factor;  // of column_sum, less the zero point
  uint32_t constant;
  StaticGrid grid;  // of which the zero point counts

  template <class Part>
  struct With {
    Part part;
    uint32_t term;
  };

  template <class Thread>
  KDQ_DEVICE auto row(Thread& thread, int64_t row) const {
    const auto part = to.row(thread, row);
    const uint32_t term = static_cast<uint32_t>(row_factor) * static_cast<uint32_t>(thread.load(row_sum + row));
    return With<std::decay_t<decltype(part)>>{part, term + constant};
  }
  template <class Thread>
  KDQ_DEVICE auto column(Thread& thread, int64_t col) const {
    const auto part = to.column(thread, col);
    uint32_t term = 0;
    if (col < cols) {
      const auto of_sum = static_cast<uint32_t>(column_factor - grid.zero_point_in(thread));
      term = of_sum * static_cast<uint32_t>(thread.load(column_sum + col));
    }
    return With<std::decay_t<decltype(part)>>{part, term};
  }
  template <class Thread, class Row, class Column>
  KDQ_DEVICE auto value(Thread& thread, const Row& row, const Column& column, int32_t sum) const {
    const uint32_t exact = static_cast<uint32_t>(factor) * static_cast<uint32_t>(sum) + row.term + column.term;
    return to.value(thread, row.part, column.part, static_cast<int32_t>(exact));
  }
  template <class Body>
  KDQ_DEVICE void with_elements(const Body& body) const {
    to.with_elements(body);
  }
};

// ---- for launching -------------------------------------------------------------------------------------------------

// The two operands of a product, whose passes are the same.
struct PlaneOperands {
  PlaneRows a;
  PlaneRows b;
};

inline PlaneOperands plane_operands(const PlaneMatrix& a, const PlaneMatrix& b, int64_t k) {
  constexpr int64_t kStepBytes = 4 * kStepWords;
  const int64_t bytes = plane_row_bytes(k);
  const int64_t pass_bytes = ceil_div(bytes, kStepBytes) * kStepBytes;
  const PlanePasses passes(a.bits, b.bits, 1, 1);  // an offset is the number of a plane
  const auto rows_of = [&](const PlaneMatrix& m) {
    PlaneRows rows = {};
    rows.planes = operand_of(m.planes, m.bits * m.rows, bytes);
    rows.rows = m.rows;
    rows.row_bytes = passes.count * pass_bytes;
    rows.pass_bytes = static_cast<uint32_t>(pass_bytes);
    return rows;
  };
  PlaneOperands operands = {rows_of(a), rows_of(b)};
  for (int i = 0; i < passes.count; ++i) {
    operands.a.plane[i] = static_cast<uint8_t>(passes.at[i].rows);
    operands.b.plane[i] = static_cast<uint8_t>(passes.at[i].weights);
    operands.b.doubles[i] = passes.at[i].doubles;
  }
  return operands;
}

inline Status check_plane_product(const PlaneMatrix& a, const char* a_name, const PlaneMatrix& b, const char* b_name,
                                  int64_t k) {
  Status status = check_binary_sizes(a.rows, b.rows, k);
  if (status.ok()) status = check_plane_count(a_name, a.bits, a.form);
  if (status.ok()) status = check_plane_count(b_name, b.bits, b.form);
  if (status.ok()) status = check_plane_sums(PlaneCodes(a.bits, a.form), PlaneCodes(b.bits, b.form), k);
  return status.ok() ? check_pointer(b_name, b.planes, b.rows * k) : status;
}

template <class Launcher, class To>
Status launch_plane_product(const Launcher& launcher, const PlaneMatrix& a, const int32_t* row_sum,
                            const PlaneMatrix& b, const int32_t* column_sum, int64_t k, const StaticGrid& grid,
                            const To& to) {
  const PlaneCodes of_a(a.bits, a.form);
  const PlaneCodes of_b(b.bits, b.form);
  const auto constant = static_cast<uint32_t>(-k * of_a.offset * of_b.offset);
  const PlaneOutput<To> output = {to,          b.rows,      row_sum,  column_sum, of_a.factor * of_b.factor,
                                  of_b.offset, of_a.offset, constant, grid};
  const PlaneOperands operands = plane_operands(a, b, k);
  const TiledProduct<PlaneProduct, PlaneOutput<To>, PlaneRows, PlaneRows> kernel = {
      operands.a, operands.b, PlaneProduct(), output, 1, operands.a.row_bytes};
  return launcher.run(kernel, kernel.blocks());
}

inline size_t plane_matmul_workspace_bytes(int64_t m, int64_t n) {
  return static_cast<size_t>(m + n) * sizeof(int32_t);
}

// workspace: plane_matmul_workspace_bytes(...).
template <class Launcher>
Status launch_bitplane_matmul(const Launcher& launcher, const PlaneMatrix& a, const PlaneMatrix& b, int64_t k,
                              int32_t* out, void* workspace) {
  Status status = check_plane_product(a, "a_planes", b, "b_planes", k);
  if (status.ok()) status = check_pointer("a_planes", a.planes, a.rows * k);
  if (status.ok()) status = check_pointer("out", out, a.rows * b.rows);
  if (status.ok()) status = check_pointer("workspace", workspace, a.rows * b.rows);
  if (!status.ok() || a.rows * b.rows == 0) return status;
  int32_t* row_sum = static_cast<int32_t*>(workspace);
  int32_t* column_sum = row_sum + a.rows;
  status = launch_sum_planes(launcher, a, k, row_sum);
  if (status.ok()) status = launch_sum_planes(launcher, b, k, column_sum);
  const StaticGrid none = {};
  return status.ok() ? launch_plane_product(launcher, a, row_sum, b, column_sum, k, none, Int32Output{out, b.rows})
                     : status;
}

// Planes of x, then the sum and the scale of each row.
inline int64_t plane_workspace_planes(int64_t m, int64_t k, int bits) { return bits * m * plane_row_bytes(k); }
inline size_t plane_linear_workspace_bytes(int64_t m, int64_t k, int bits) {
  return static_cast<size_t>(plane_workspace_planes(m, k, bits) + m * 8);
}

inline Status check_bitplane_linear(const BitplaneLinear& args) {
  const kdq::BitplaneLinear& layer = args.layer;
  Status status =
      check_static_grid(args.input_scale_at == nullptr ? &layer.input_scale : nullptr,
                        args.input_zero_point_at == nullptr ? &layer.input_zero_point : nullptr, layer.input_quant_max);
  const PlaneMatrix x = {nullptr, layer.m, status.ok() ? planes_of(layer.input_quant_max) : 1, PlaneForm::kUnsigned};
  if (status.ok()) status = check_plane_product(x, "x", layer.weight, "weight_planes", layer.k);
  if (status.ok()) status = check_pointer("x", layer.x, layer.m * layer.k);
  if (status.ok()) status = check_pointer("y", layer.y, layer.m * layer.weight.rows);
  if (status.ok()) status = check_pointer("weight_sum", layer.weight_sum, layer.weight.rows);
  if (status.ok()) status = check_pointer("weight_scale", layer.weight_scale, layer.weight.rows);
  return status.ok() ? check_pointer("workspace", args.workspace, layer.m) : status;
}

template <class Launcher>
Status launch_bitplane_linear(const Launcher& launcher, const BitplaneLinear& args) {
  const kdq::BitplaneLinear& layer = args.layer;
  const PlaneMatrix& w = layer.weight;
  Status status = check_bitplane_linear(args);
  if (!status.ok() || layer.m * w.rows == 0) return status;
  const int bits = planes_of(layer.input_quant_max);
  char* workspace = static_cast<char*>(args.workspace);
  int32_t* row_sum = reinterpret_cast<int32_t*>(workspace + plane_workspace_planes(layer.m, layer.k, bits));
  float* row_scale = reinterpret_cast<float*>(row_sum + layer.m);
  const StaticGrid grid = {args.input_scale_at, layer.input_scale, args.input_zero_point_at, layer.input_zero_point,
                           static_cast<float>(layer.input_quant_max)};
  const PlaneMatrix x = {reinterpret_cast<const uint64_t*>(workspace), layer.m, bits, PlaneForm::kUnsigned};
  status = launch_quantize_planes(launcher, layer.dtype, layer.x, layer.k, grid,
                                  plane_bytes_of(workspace, layer.m, layer.k, bits), row_sum, row_scale);
  if (!status.ok()) return status;
  const LinearOutput output = {layer.y, layer.dtype, w.rows, layer.weight_scale, layer.bias, layer.activation};
  return launch_plane_product(launcher, x, row_sum, w, layer.weight_sum, layer.k, grid,
                              ScaledOutput{output, row_scale});
}

}  // namespace kdq::cuda
