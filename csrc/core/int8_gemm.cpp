// Public products of the int8 family: the exact matmul, and the linear layers with integer or float activations.
#include "kdq/int8_gemm.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "core/checks.h"
#include "core/format.h"
#include "core/packed_weight.h"
#include "core/product.h"

namespace kdq {
namespace {

Status check_m(int64_t m) {
  return m >= 0 ? Status() : Status::invalid("m: expected at least 0, got " + std::to_string(m));
}

Status check_k(const char* name, int64_t k, int64_t packed_k, int64_t max_k) {
  if (k != packed_k) {
    return Status::invalid(std::string(name) + ": has K = " + std::to_string(k) +
                           ", but the packed weight has K = " + std::to_string(packed_k));
  }
  if (k <= max_k) return {};
  return Status::invalid(std::string(name) + ": K = " + std::to_string(k) +
                         " would overflow int32 sums; expected at most " + std::to_string(max_k));
}

bool usable_scale(float scale) { return (scale > 0.0F) & (scale <= FLT_MAX); }

// The first pass has no branch, so that compilers vectorise it: it runs in every call.
Status check_weight_scale(const float* scale, int64_t n) {
  bool usable = true;
  for (int64_t i = 0; i < n; ++i) usable &= usable_scale(scale[i]);
  if (usable) return {};
  int64_t first = 0;
  while (usable_scale(scale[first])) ++first;
  return Status::invalid("weight_scale: expected positive finite numbers, got " + format(scale[first]) + " at index " +
                         std::to_string(first));
}

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

// Multiply-accumulates that each thread must find to do: some 3 us of work, or waking a second one costs more than it
// saves.
constexpr int64_t kProductsWorthAThread = 3 << 18;

// What is the same in every tile of a call.
struct Call {
  const Int8Kernels* kernels = nullptr;
  PackedWeight weight;
  Int8Epilogue epilogue = {};  // of channel 0
  Result result = Result::kInt32;
  void* y = nullptr;
  Place place = Place::kNear;
  const char* x = nullptr;
  int64_t m = 0;
  int64_t k = 0;
  int64_t x_row_bytes = 0;
  int64_t mr = 0;  // rows of a full tile

  Status open(const void* packed, size_t packed_bytes) {
    Status status = int8_kernels(&kernels);
    return status.ok() ? open_packed(kernels->size, packed, packed_bytes, &weight) : status;
  }

  void set_input(const void* rows, int64_t count, int64_t length, size_t element_bytes) {
    x = static_cast<const char*>(rows);
    m = count;
    k = length;
    x_row_bytes = length * static_cast<int64_t>(element_bytes);
  }

  void set_linear(const Int8Linear& args) {
    set_input(args.x, args.m, args.k, dtype_size(args.dtype));
    epilogue.weight_scale = args.weight_scale;
    epilogue.bias = args.bias;
    epilogue.activation = args.activation;
    result = static_cast<Result>(args.dtype);
    y = args.y;
  }

  int64_t grain() const {
    const bool is_shared = m * weight.n * weight.k >= 2 * kProductsWorthAThread;
    return is_shared ? kProductsWorthAThread : std::numeric_limits<int64_t>::max() - 1;
  }

  Int8RowsCall rows_at(int64_t first, int count, const PreparedRows& to) const {
    return {x + first * x_row_bytes, k, count, to.rows, to.stride, to.scales};
  }

  int tile_rows() const { return kdq::tile_rows(kernels->size, weight.panel_channels); }

  // Of `count` panels from the given one on; set_rows() adds what belongs to the rows.
  Int8TileCall tile(int64_t panel, int count) const {
    const int64_t channel = panel * kernels->size.nr;
    Int8TileCall call;
    call.panels = {weight.panel + panel * weight.panel_bytes, weight.panel_bytes,
                   weight.panel_channels * kernels->size.ku, count};
    call.units = weight.units;
    call.epilogue = epilogue;
    call.epilogue.column_sum = weight.column_sum + channel;
    if (epilogue.weight_scale != nullptr) call.epilogue.weight_scale += channel;
    if (epilogue.bias != nullptr) call.epilogue.bias += channel;
    call.out.type = result;
    call.out.element_bytes = result_bytes(result);
    call.out.cols = static_cast<int>(std::min<int64_t>(count * kernels->size.nr, weight.n - channel));
    call.out.y_stride = weight.n;
    call.out.place = place;
    return call;
  }

  void set_rows(const RowTile& rows, int64_t panel, Int8TileCall* call) const {
    call->rows = rows.rows;
    call->row_stride = rows.stride;
    call->row_scale = rows.scales;
    call->out.rows = rows.count;
    call->out.y = static_cast<char*>(y) + (rows.first * weight.n + panel * kernels->size.nr) * call->out.element_bytes;
    set_ahead(rows, call);
  }

  // So many tiles have one panel to each group: with several, there is but one tile.
  static constexpr int64_t kTilesWorthAsking = 4;

  // The rows that are prepared next, or, if they are already, the panel that follows, in pieces while the block's first
  // tiles are made. Panels that few tiles read are left to the CPU's own prefetching, which is quicker where the memory
  // is the limit.
  void set_ahead(const RowTile& rows, Int8TileCall* call) const {
    call->ahead = static_cast<const char*>(rows.rows);
    call->ahead_step = 0;
    if (kernels->ahead_step == 0) return;
    if (rows.next_prepared >= 0) {
      if (!is_far(m * x_row_bytes)) return;
      call->ahead = x + rows.next_prepared * x_row_bytes;
      call->ahead_step = std::min(kernels->ahead_step, mr * x_row_bytes / weight.units);
    } else if (rows.next_group >= 0 && rows.tiles >= kTilesWorthAsking && is_far(weight.panels * weight.panel_bytes)) {
      const int64_t asked = rows.tile_in_group * kernels->ahead_step * weight.units;  // while those before were made
      if (asked >= weight.panel_bytes) return;
      call->ahead = reinterpret_cast<const char*>(weight.panel) + rows.next_group * weight.panel_bytes + asked;
      call->ahead_step = kernels->ahead_step;
    }
  }
};

// mr: rows of a full tile. element_bytes: of a prepared row. at_once: panels_at_once or float_panels_at_once.
// prepare(Int8RowsCall)
template <class Prepare>
Status run(Call& call, int64_t mr, int64_t element_bytes, int (*at_once)(int, int), void (*tile)(const Int8TileCall&),
           const ParallelFor& parallel_for, Prepare&& prepare) {
  const Int8Tile& size = call.kernels->size;
  const PackedWeight& weight = call.weight;
  const int64_t m = call.m;
  const int panels = m > size.mr ? 1 : at_once(size.mr, static_cast<int>(std::max<int64_t>(m, 1)));
  call.mr = mr;
  call.place = place_of(call.y, m, weight.n * result_bytes(call.result));
  ProductShape shape;
  shape.m = m;
  shape.row_bytes = weight.units * size.ku * element_bytes;
  shape.mr = mr;
  shape.groups = (weight.panels + panels - 1) / panels;
  shape.row_work = panels * weight.panel_channels * weight.k;
  shape.grain = call.grain();
  return run_product(
      shape, parallel_for,
      [&](int64_t first, int count, const PreparedRows& to) { prepare(call.rows_at(first, count, to)); },
      [&](int64_t group) {
        const int64_t panel = group * panels;
        const bool together = panel + panels <= weight.panels;
        const int64_t end = together ? panel + 1 : weight.panels;
        return [&, panel, end, of_group = call.tile(panel, together ? panels : 1)](const RowTile& rows) mutable {
          call.set_rows(rows, panel, &of_group);
          tile(of_group);
          for (int64_t p = panel + 1; p < end; ++p) {
            Int8TileCall other = call.tile(p, 1);
            call.set_rows(rows, p, &other);
            tile(other);
          }
        };
      });
}

// Most rows of a block of bfloat16 rows: panels are widened once for each block, so that these are as large as leaves
// some pieces for each thread. Tiles read a row once for each panel: it may as well come from L3.
int64_t bf16_block_rows(int64_t m, int64_t panels) {
  constexpr int64_t kPieces = 64;
  return std::clamp<int64_t>(m * panels / kPieces, 128, 512);
}

// bfloat16 rows as they are, copied only where k ends within a unit.
Status run_bf16(Call& call, const Int8Bf16Kernels& bf16, const ParallelFor& parallel_for) {
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
  Call call;
  Status status = call.open(packed, packed_bytes);
  if (status.ok()) status = check_m(m);
  if (status.ok()) status = check_k("a", k, call.weight.k, kInt8MaxK);
  if (!status.ok()) return status;
  if (m * k > 0 && a == nullptr) return Status::invalid("a: expected a pointer, got null");
  if (m * call.weight.n > 0 && out == nullptr) return Status::invalid("out: expected a pointer, got null");
  const Int8Kernels& kernels = *call.kernels;
  call.epilogue.offset = kernels.size.signed_offset;
  call.y = out;
  call.set_input(a, m, k, sizeof(int8_t));
  return run(call, call.tile_rows(), kernels.size.element_bytes, panels_at_once, kernels.tile, parallel_for,
             kernels.prepare_int8);
}

Status int8_linear(const Int8Linear& args, const ParallelFor& parallel_for) {
  Call call;
  Status status = call.open(args.packed, args.packed_bytes);
  if (status.ok()) status = check_linear(args, call.weight, args.is_static ? kInt8StaticMaxK : kInt8MaxK);
  if (status.ok() && args.is_static) {
    status = check_static_grid(&args.input_scale, &args.input_zero_point, args.input_quant_max);
  }
  if (!status.ok()) return status;
  const Int8Kernels& kernels = *call.kernels;
  const int dtype = static_cast<int>(args.dtype);
  const StaticGrid grid = {1.0F / args.input_scale, static_cast<float>(args.input_zero_point),
                           static_cast<float>(args.input_quant_max)};
  call.set_linear(args);
  call.epilogue.offset = args.is_static ? args.input_zero_point : kernels.size.signed_offset;
  return run(call, call.tile_rows(), kernels.size.element_bytes, panels_at_once, kernels.tile, parallel_for,
             [&](const Int8RowsCall& rows) {
               args.is_static ? kernels.prepare_static[dtype](rows, grid, args.input_scale)
                              : kernels.prepare_dynamic[dtype](rows);
             });
}

Status int8_weight_only_linear(const Int8Linear& args, const ParallelFor& parallel_for) {
  Call call;
  Status status = call.open(args.packed, args.packed_bytes);
  if (status.ok()) status = check_linear(args, call.weight, kInt8MaxK);
  if (!status.ok()) return status;
  const Int8Kernels& kernels = *call.kernels;
  call.set_linear(args);
  const Int8Bf16Kernels* bf16 = args.dtype == DType::kBFloat16 ? int8_bf16_kernels(kernels) : nullptr;
  if (bf16 != nullptr) return run_bf16(call, *bf16, parallel_for);
  return run(call, kernels.size.mr, sizeof(float), float_panels_at_once, kernels.weight_only_tile, parallel_for,
             [&](const Int8RowsCall& rows) {
               std::fill_n(rows.scales, rows.count, 1.0F);
               kernels.widen[static_cast<int>(args.dtype)](rows);
             });
}

}  // namespace kdq
