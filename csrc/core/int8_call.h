// A call of an int8 product: what is the same in all of its tiles, and how it runs. For the functions on plain rows
// (int8_gemm.cpp) and for convolutions (int8_conv2d.cpp), which differ in how rows are prepared.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "core/format.h"
#include "core/packed_weight.h"
#include "core/product.h"
#include "kdq/int8_gemm.h"

namespace kdq {

inline Status check_m(int64_t m) {
  return m >= 0 ? Status() : Status::invalid("m: expected at least 0, got " + std::to_string(m));
}

inline Status check_k(const char* name, int64_t k, int64_t packed_k, int64_t max_k) {
  if (k != packed_k) {
    return Status::invalid(std::string(name) + ": has K = " + std::to_string(k) +
                           ", but the packed weight has K = " + std::to_string(packed_k));
  }
  if (k <= max_k) return {};
  return Status::invalid(std::string(name) + ": K = " + std::to_string(k) +
                         " would overflow int32 sums; expected at most " + std::to_string(max_k));
}

// As integers, usable scales are 1 ... kLargest: the first pass, which is part of every call, takes four simple
// operations a vector of any CPU. The top bit tells of an integer out of that range.
inline Status check_weight_scale(const float* scale, int64_t n) {
  constexpr uint32_t kLargest = 0x7f7fffff;  // FLT_MAX; above are inf, NaN and what has a sign
  const auto outside = [scale](int64_t i) {
    uint32_t bits = 0;
    memcpy(&bits, scale + i, sizeof(bits));
    return ((bits - 1) | (kLargest - bits)) >> 31;
  };
  uint32_t any = 0;
  for (int64_t i = 0; i < n; ++i) any |= outside(i);
  if (any == 0) return {};
  int64_t first = 0;
  while (outside(first) == 0) ++first;
  return Status::invalid("weight_scale: expected positive finite numbers, got " + format(scale[first]) + " at index " +
                         std::to_string(first));
}

// Multiply-accumulates that each thread must find to do: some 3 us of work, or waking a second one costs more than it
// saves.
constexpr int64_t kProductsWorthAThread = 3 << 18;
// Fewer rows take as long as so many: reading the weights is what takes the time.
constexpr int64_t kRowsOfReading = 3;

// What is the same in every tile of a call.
struct Int8Call {
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
  int64_t mr = 0;           // rows of a full tile
  int64_t unit_bytes = 0;   // of a prepared row
  int64_t piece_units = 0;  // of a piece of k, if weights are streamed: see may_stream()
  int64_t cost = 1;         // of a multiply-accumulate, in those of int8

  Status open(const void* packed, size_t packed_bytes) {
    Status status = int8_kernels(&kernels);
    return status.ok() ? open_packed(kernels->size, packed, packed_bytes, &weight) : status;
  }

  // For products that have no scale of rows to make up for the size of few-bit weights, or float rows.
  Status check_eight_bits(const char* name) const {
    if (weight.bits == 8) return {};
    return Status::invalid(std::string(name) + ": holds weights of " + std::to_string(weight.bits) +
                           " bits, which int8_linear and int8_conv2d alone take; expected 8");
  }

  void set_input(const void* rows, int64_t count, int64_t length, size_t element_bytes) {
    x = static_cast<const char*>(rows);
    m = count;
    k = length;
    x_row_bytes = length * static_cast<int64_t>(element_bytes);
  }

  // All but the rows.
  void set_layer(const Int8Linear& args) {
    epilogue.weight_scale = args.weight_scale;
    epilogue.bias = args.bias;
    epilogue.activation = args.activation;
    result = static_cast<Result>(args.dtype);
    y = args.y;
  }

  int64_t grain() const {
    const int64_t rows = std::max(m, kRowsOfReading);
    const int64_t worth = kProductsWorthAThread / cost;
    const bool is_shared = rows * weight.n * weight.k >= 2 * worth;
    return is_shared ? worth * m / rows : std::numeric_limits<int64_t>::max() - 1;
  }

  // Threads take whole groups of panels. One cannot be shared, three and five not evenly: rows are cut into two blocks
  // then, which costs a tile more at most.
  void even_out(ProductShape* shape) const {
    constexpr int64_t kMostGroups = 5;
    const bool is_shared = 2 * shape->grain <= m * shape->row_work * shape->groups;
    const bool is_uneven = shape->groups % 2 == 1 && shape->groups <= kMostGroups && rows_of_block(*shape) >= m;
    if (is_shared && is_uneven && m > 2 * mr) shape->block_rows = (m + 1) / 2;
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
    piece_units > 0 ? set_piece(rows, panel, call) : set_ahead(rows, call);
  }

  // Few rows of a weight that no cache keeps until its next turn, as other layers come in between: memory is to be read
  // at an even pace, whatever is multiplied meanwhile. One tile asks for what is kOneTileAhead on; several go through
  // one piece of a panel, which stays in L1, and ask for the next, before any goes on to it. A panel at a time, memory
  // would wait for all tiles but the first, and the first one for memory: 8 x 11008 x 4096 took 1.45 ms instead of
  // 0.95. Weights that are in L2 all the same cost up to 5 %, for sums that are put aside.
  static constexpr int64_t kStreamedBytes = int64_t{512} << 10;
  static constexpr int64_t kMostStreamedTiles = 8;
  static constexpr int64_t kPieceBytes = int64_t{16} << 10;
  static constexpr int64_t kOneTileAhead = int64_t{12} << 10;
  static constexpr int64_t kMostStreamedRowBytes = int64_t{4} << 20;  // prepared, in one block

  bool may_stream(int least_rows) const {
    const Int8Tile& size = kernels->size;
    return m >= least_rows && m <= kMostStreamedTiles * size.mr && weight.panel_channels == size.nr &&
           weight.panels * weight.panel_bytes >= kStreamedBytes &&
           m * padded_stride(weight.units * unit_bytes) <= kMostStreamedRowBytes;
  }

  int64_t shares() const { return 8 / weight.bits; }  // units of k in a step's bytes

  void cut_into_pieces(ProductShape* shape) {
    const int64_t steps = weight.units / shares();
    const int64_t pieces = m > mr ? (weight.panel_bytes + kPieceBytes - 1) / kPieceBytes : 1;
    piece_units = (steps + pieces - 1) / pieces * shares();
    shape->pieces = (weight.units + piece_units - 1) / piece_units;
    shape->block_rows = m;
    shape->block_bytes = kMostStreamedRowBytes;
    shape->panel_bytes = (m + mr) * kernels->size.nr * static_cast<int64_t>(sizeof(int32_t));
  }

  void set_piece(const RowTile& rows, int64_t panel, Int8TileCall* call) const {
    const int64_t first = rows.piece * piece_units;
    const int64_t step = call->panels.step;
    call->units = std::min(piece_units, weight.units - first);
    call->rows = rows.rows + first * unit_bytes;
    call->panels.first = weight.panel + panel * weight.panel_bytes + first / shares() * step;
    call->ahead_step = step / rows.tiles;  // each tile asks for its part of the next piece
    call->ahead = reinterpret_cast<const char*>(call->panels.first) +
                  (rows.tiles > 1 ? piece_units / shares() * step : kOneTileAhead) +
                  rows.tile_in_group * call->ahead_step * (call->units / shares());
    int32_t* sums = reinterpret_cast<int32_t*>(rows.panel) + rows.tile_in_group * mr * kernels->size.nr;
    call->sums_before = first > 0 ? sums : nullptr;
    call->sums_after = first + call->units < weight.units ? sums : nullptr;
  }

  // So many tiles have one panel to each group: with several, there is but one tile. Two have no time to ask for a
  // panel.
  static constexpr int64_t kTilesWorthAsking = 3;

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

// tile: of `panels` panels at once, or of one where there are fewer left.
template <class Prepare>
Status run_panels(Int8Call& call, const ProductShape& shape, int panels, Int8TileFunction tile,
                  const ParallelFor& parallel_for, Prepare&& prepare) {
  return run_product(shape, parallel_for, prepare, [&, panels, tile](int64_t group) {
    const int64_t panel = group * panels;
    const bool together = panel + panels <= call.weight.panels;
    const int64_t end = together ? panel + 1 : call.weight.panels;
    return [&, tile, panel, end, of_group = call.tile(panel, together ? panels : 1)](const RowTile& rows) mutable {
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

// mr: rows of a full tile. element_bytes: of a prepared row. at_once: panels_at_once or float_panels_at_once.
// prepare(first, count, PreparedRows): rows of the product from `first` on.
template <class Prepare>
Status run_int8(Int8Call& call, int64_t mr, int64_t element_bytes, int (*at_once)(int, int), const Int8Tiles& tiles,
                const ParallelFor& parallel_for, Prepare&& prepare) {
  const Int8Tile& size = call.kernels->size;
  const PackedWeight& weight = call.weight;
  const int64_t m = call.m;
  const bool few_bits = weight.bits < 8;
  const Int8Tiles& of_bits = !few_bits          ? tiles
                             : weight.bits == 4 ? call.kernels->four_bit_tiles
                                                : call.kernels->two_bit_tiles;
  call.unit_bytes = size.ku * element_bytes;
  call.piece_units = 0;  // a convolution runs its call once for each group of images
  const bool streams = of_bits.streamed != nullptr && call.may_stream(of_bits.streamed_rows);
  const bool is_low = m <= size.mr && !streams;
  const int panels = is_low ? at_once(size.mr, static_cast<int>(std::max<int64_t>(m, 1))) : 1;
  if (few_bits) mr = size.mr;
  call.mr = mr;
  call.place = place_of(call.y, m, weight.n * result_bytes(call.result));
  ProductShape shape;
  shape.m = m;
  shape.row_bytes = weight.units * call.unit_bytes;
  shape.mr = mr;
  shape.groups = (weight.panels + panels - 1) / panels;
  shape.row_work = panels * weight.panel_channels * weight.k;
  shape.grain = call.grain();
  streams ? call.cut_into_pieces(&shape) : call.even_out(&shape);
  const Int8TileFunction tile = streams ? of_bits.streamed : of_bits.plain;
  if (!few_bits) return run_panels(call, shape, panels, tile, parallel_for, prepare);

  const float factor = 1.0F / static_cast<float>(1 << (8 - weight.bits));  // see packed_weight.h
  return run_panels(call, shape, panels, tile, parallel_for, [&](int64_t first, int count, const PreparedRows& to) {
    prepare(first, count, to);
    for (int r = 0; r < count; ++r) to.scales[r] *= factor;
  });
}

}  // namespace kdq
