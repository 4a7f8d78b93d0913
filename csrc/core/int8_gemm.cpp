// Public products of the int8 family: the exact matmul, and the linear layers with integer or float activations.
#include "kdq/int8_gemm.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <string>

#include "core/format.h"
#include "core/int8_product.h"

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

Status check_static_grid(const Int8Linear& args) {
  const bool usable =
      args.input_scale > 0.0F && std::isfinite(args.input_scale) && std::isfinite(1.0F / args.input_scale);
  if (!usable) {
    return Status::invalid("input_scale: expected positive and finite, with a finite reciprocal, got " +
                           format(args.input_scale));
  }
  if (args.input_quant_max < 1 || args.input_quant_max > 255) {
    return Status::invalid("input_quant_max: expected 1 to 255, got " + std::to_string(args.input_quant_max));
  }
  if (args.input_zero_point < 0 || args.input_zero_point > args.input_quant_max) {
    return Status::invalid("input_zero_point: expected 0 to " + std::to_string(args.input_quant_max) + ", got " +
                           std::to_string(args.input_zero_point));
  }
  return {};
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

struct Call {
  const Int8Kernels* kernels = nullptr;
  PackedWeight weight;

  Status open(const void* packed, size_t packed_bytes) {
    Status status = int8_kernels(&kernels);
    return status.ok() ? open_packed(kernels->size, packed, packed_bytes, &weight) : status;
  }

  // at_once: panels_at_once or float_panels_at_once.
  ProductShape shape(int64_t m, int64_t element_bytes, int (*at_once)(int, int)) const {
    const Int8Tile& tile = kernels->size;
    const int rows = static_cast<int>(std::clamp<int64_t>(m, 1, tile.mr));
    return {m, weight.units * tile.ku * element_bytes, tile.mr, tile.nr, at_once(tile.mr, rows)};
  }

  void tile(const char* rows, int64_t stride, int count, const PanelGroup& panels, int32_t* acc) const {
    kernels->tile(rows, stride, count, panels, weight.units, acc);
  }
};

// The epilogue of the linear layers but for the offset.
Int8Epilogue linear_epilogue(const Int8Linear& args, const PackedWeight& weight, int64_t channel) {
  Int8Epilogue e = {};
  e.column_sum = weight.column_sum + channel;
  e.weight_scale = args.weight_scale + channel;
  e.bias = args.bias == nullptr ? nullptr : args.bias + channel;
  e.activation = args.activation;
  return e;
}

const char* input_row(const Int8Linear& args, int64_t row) {
  return static_cast<const char*>(args.x) + static_cast<size_t>(row * args.k) * dtype_size(args.dtype);
}

char* output_at(const Int8Linear& args, const PackedWeight& weight, int64_t row, int64_t channel) {
  return static_cast<char*>(args.y) + static_cast<size_t>(row * weight.n + channel) * dtype_size(args.dtype);
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
  return run_product<int32_t>(
      call.shape(m, kernels.size.element_bytes, panels_at_once), call.weight, parallel_for,
      [&](int64_t row, char* buffer) {
        kernels.prepare_int8(a + row * k, k, buffer);
        return 1.0F;
      },
      [&](const char* rows, int64_t stride, int count, const PanelGroup& panels, int32_t* acc) {
        call.tile(rows, stride, count, panels, acc);
      },
      [&](const int32_t* acc, int64_t row, int64_t channel, const float*, TileOutput tile) {
        Int8Epilogue e = {};
        e.column_sum = call.weight.column_sum + channel;
        e.offset = kernels.size.signed_offset;
        tile.y = out + row * call.weight.n + channel;
        kernels.store_int32(acc, e, tile);
      });
}

Status int8_linear(const Int8Linear& args, const ParallelFor& parallel_for) {
  Call call;
  Status status = call.open(args.packed, args.packed_bytes);
  if (status.ok()) status = check_linear(args, call.weight, args.is_static ? kInt8StaticMaxK : kInt8MaxK);
  if (status.ok() && args.is_static) status = check_static_grid(args);
  if (!status.ok()) return status;
  const Int8Kernels& kernels = *call.kernels;
  const int dtype = static_cast<int>(args.dtype);
  const StaticGrid grid = {1.0F / args.input_scale, static_cast<float>(args.input_zero_point),
                           static_cast<float>(args.input_quant_max)};
  const int32_t offset = args.is_static ? args.input_zero_point : kernels.size.signed_offset;
  return run_product<int32_t>(
      call.shape(args.m, kernels.size.element_bytes, panels_at_once), call.weight, parallel_for,
      [&](int64_t row, char* buffer) {
        const char* x = input_row(args, row);
        return args.is_static ? kernels.prepare_static[dtype](x, args.k, grid, args.input_scale, buffer)
                              : kernels.prepare_dynamic[dtype](x, args.k, buffer);
      },
      [&](const char* rows, int64_t stride, int count, const PanelGroup& panels, int32_t* acc) {
        call.tile(rows, stride, count, panels, acc);
      },
      [&](const int32_t* acc, int64_t row, int64_t channel, const float* row_scale, TileOutput tile) {
        Int8Epilogue e = linear_epilogue(args, call.weight, channel);
        e.offset = offset;
        tile.y = output_at(args, call.weight, row, channel);
        kernels.store[dtype](acc, e, row_scale, tile);
      });
}

Status int8_weight_only_linear(const Int8Linear& args, const ParallelFor& parallel_for) {
  Call call;
  Status status = call.open(args.packed, args.packed_bytes);
  if (status.ok()) status = check_linear(args, call.weight, kInt8MaxK);
  if (!status.ok()) return status;
  const Int8Kernels& kernels = *call.kernels;
  const int dtype = static_cast<int>(args.dtype);
  return run_product<float>(
      call.shape(args.m, sizeof(float), float_panels_at_once), call.weight, parallel_for,
      [&](int64_t row, char* buffer) {
        kernels.widen[dtype](input_row(args, row), args.k, reinterpret_cast<float*>(buffer));
        return 1.0F;
      },
      [&](const char* rows, int64_t stride, int count, const PanelGroup& panels, float* acc) {
        const int64_t floats = stride / static_cast<int64_t>(sizeof(float));
        kernels.float_tile(reinterpret_cast<const float*>(rows), floats, count, panels, call.weight.units, acc);
      },
      [&](const float* acc, int64_t row, int64_t channel, const float* row_scale, TileOutput tile) {
        tile.y = output_at(args, call.weight, row, channel);
        kernels.store_float[dtype](acc, linear_epilogue(args, call.weight, channel), row_scale, tile);
      });
}

}  // namespace kdq
