// Public products of the int8 family: the exact matmul, and the linear layers with integer or float activations.
#include "kdq/int8_gemm.h"

#include <algorithm>
#include <cstring>

#include "core/checks.h"
#include "core/int8_call.h"

namespace kdq {
namespace {

Status check_linear(const Int8Linear& args, const PackedWeight& weight, int64_t max_k) {
  Status status = check_m(args.m);
  if (status.ok()) status = check_k("x", args.k, weight.k, max_k);
  if (!status.ok()) return status;
  if (args.m * args.k > 0 && args.x == nullptr) return Status::invalid("x: expected a pointer, got null");
  if (args.m * weight.n > 0 && args.y == nullptr) return Status::invalid("y: expected a pointer, got null");
  if (weight.n > 0 && args.weight_scale == nullptr)
    return Status::invalid("weight_scale: expected a pointer, got null");
  return check_weight_scale(args.weight_scale, weight.n);
}

// Most rows of a block of bfloat16 rows: panels are widened once for each block, so that these are as large as leaves
// some pieces for each thread. Tiles read a row once for each panel: it may as well come from L3.
int64_t bf16_block_rows(int64_t m, int64_t panels) {
  constexpr int64_t kPieces = 64;
  return std::clamp<int64_t>(m * panels / kPieces, 128, 512);
}

// bfloat16 rows as they are, copied only where k ends within a unit.
Status run_bf16(Int8Call& call, const Int8Bf16Kernels& bf16, const ParallelFor& parallel_for) {
  const PackedWeight& weight = call.weight;
  const int64_t padded_k = weight.units * call.kernels->size.ku;
  const bool is_padded = padded_k != weight.k;
  const bool is_widened = call.m > 2 * bf16.mr;  // two tiles widen weights as they read them
  call.mr = bf16.mr;
  call.place = place_of(call.y, call.m, weight.n * result_bytes(call.result));
  ProductShape shape;
  shape.m = call.m;
  shape.row_bytes = is_padded ? padded_k * static_cast<int64_t>(sizeof(BFloat16)) : 0;
  shape.mr = bf16.mr;
  shape.groups = weight.panels;
  shape.row_work = weight.panel_channels * weight.k;
  shape.grain = call.grain();
  shape.block_rows = bf16_block_rows(call.m, weight.panels);
  shape.block_bytes = int64_t{4} << 20;
  shape.panel_bytes = is_widened ? 2 * weight.panel_bytes : 0;
  return run_product(
      shape, parallel_for,
      [&](int64_t first, int count, const PreparedRows& to) {
        std::fill_n(to.scales, count, 1.0F);
        for (int r = 0; is_padded && r < count; ++r) {
          char* row = to.rows + r * to.stride;
          std::memcpy(row, call.x + (first + r) * call.x_row_bytes, static_cast<size_t>(call.x_row_bytes));
          std::memset(row + call.x_row_bytes, 0, static_cast<size_t>(shape.row_bytes - call.x_row_bytes));
        }
      },
      [&](int64_t panel) {
        return [&, panel, of_panel = call.tile(panel, 1)](const RowTile& rows) mutable {
          call.set_rows(rows, panel, &of_panel);
          if (!is_padded) {
            of_panel.rows = call.x + rows.first * call.x_row_bytes;
            of_panel.row_stride = call.x_row_bytes;
          }
          if (!is_widened) return bf16.tile(of_panel);
          int8_t* widened = reinterpret_cast<int8_t*>(rows.panel);
          if (rows.tile_in_group == 0) {
            bf16.widen_panel(of_panel.panels.first, weight.panel_bytes, of_panel.panels.step, widened);
          }
          of_panel.panels.first = widened;
          bf16.widened_tile(of_panel);
        };
      });
}

}  // namespace

Status int8_matmul(const int8_t* a, int64_t m, int64_t k, const void* packed, size_t packed_bytes, int32_t* out,
                   const ParallelFor& parallel_for) {
  Int8Call call;
  Status status = call.open(packed, packed_bytes);
  if (status.ok()) status = call.check_eight_bits("b");
  if (status.ok()) status = check_m(m);
  if (status.ok()) status = check_k("a", k, call.weight.k, kInt8MaxK);
  if (!status.ok()) return status;
  if (m * k > 0 && a == nullptr) return Status::invalid("a: expected a pointer, got null");
  if (m * call.weight.n > 0 && out == nullptr) return Status::invalid("out: expected a pointer, got null");
  const Int8Kernels& kernels = *call.kernels;
  call.epilogue.offset = kernels.size.signed_offset;
  call.y = out;
  call.set_input(a, m, k, sizeof(int8_t));
  return run_int8(
      call, call.tile_rows(), kernels.size.element_bytes, panels_at_once, kernels.tiles, parallel_for,
      [&](int64_t first, int count, const PreparedRows& to) { kernels.prepare_int8(call.rows_at(first, count, to)); });
}

Status int8_linear(const Int8Linear& args, const ParallelFor& parallel_for) {
  Int8Call call;
  Status status = call.open(args.packed, args.packed_bytes);
  if (status.ok()) status = check_linear(args, call.weight, args.is_static ? kInt8StaticMaxK : kInt8MaxK);
  if (status.ok() && args.is_static) {
    status = check_static_grid(&args.input_scale, &args.input_zero_point, args.input_quant_max);
  }
  if (!status.ok()) return status;
  const Int8Kernels& kernels = *call.kernels;
  const int dtype = static_cast<int>(args.dtype);
  const StaticGrid grid = {1.0F / args.input_scale, args.input_zero_point, args.input_quant_max};
  call.set_input(args.x, args.m, args.k, dtype_size(args.dtype));
  call.set_layer(args);
  call.epilogue.offset = args.is_static ? args.input_zero_point : kernels.size.signed_offset;
  return run_int8(call, call.tile_rows(), kernels.size.element_bytes, panels_at_once, kernels.tiles, parallel_for,
                  [&](int64_t first, int count, const PreparedRows& to) {
                    const Int8RowsCall rows = call.rows_at(first, count, to);
                    args.is_static ? kernels.prepare_static[dtype](rows, grid, args.input_scale)
                                   : kernels.prepare_dynamic[dtype](rows);
                  });
}

Status int8_weight_only_linear(const Int8Linear& args, const ParallelFor& parallel_for) {
  Int8Call call;
  Status status = call.open(args.packed, args.packed_bytes);
  if (status.ok()) status = call.check_eight_bits("packed");
  if (status.ok()) status = check_linear(args, call.weight, kInt8MaxK);
  if (!status.ok()) return status;
  const Int8Kernels& kernels = *call.kernels;
  call.set_input(args.x, args.m, args.k, dtype_size(args.dtype));
  call.set_layer(args);
  const Int8Bf16Kernels* bf16 = args.dtype == DType::kBFloat16 ? int8_bf16_kernels(kernels) : nullptr;
  call.cost = bf16 != nullptr ? 2 : 4;  // what the instructions differ by
  if (bf16 != nullptr) return run_bf16(call, *bf16, parallel_for);
  return run_int8(call, kernels.size.mr, sizeof(float), float_panels_at_once, kernels.weight_only_tiles, parallel_for,
                  [&](int64_t first, int count, const PreparedRows& to) {
                    std::fill_n(to.scales, count, 1.0F);
                    kernels.widen[static_cast<int>(args.dtype)](call.rows_at(first, count, to));
                  });
}

}  // namespace kdq
