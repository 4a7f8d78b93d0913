// int8_matmul and int8_linear on a GPU: what the tiled product makes of int8, and what becomes of its sums.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/checks.h"
#include "cuda/product.h"
#include "cuda/quantize_rows.h"
#include "kdq/cuda.h"

namespace kdq::cuda {

// Sums as they are.
struct Int32Output {
  int32_t* out;
  int64_t cols;

  template <class Thread>
  KDQ_DEVICE void store(Thread& thread, int64_t row, int64_t col, int32_t sum, uint32_t, uint32_t) const {
    thread.store(out + row * cols + col, sum);
  }
};

KDQ_DEVICE float activate(float y, Activation activation) {
  if (activation == Activation::kRelu) return y < 0.0F ? 0.0F : y;
  if (activation == Activation::kGelu) return 0.5F * y * erfcf(y * -0.70710678F);
  return y / (1.0F + expf(-y));  // SiLU
}

// activation(sum * (row_scale * weight_scale) + bias), cast.
struct ScaledOutput {
  void* y;
  DType dtype;
  int64_t cols;
  const float* row_scale;
  const float* weight_scale;
  const float* bias;  // or nullptr
  Activation activation;

  // Not inlined: a thread stores 64 results, and each would bring all of this.
  template <class Thread>
  KDQ_DEVICE_CALL void store(Thread& thread, int64_t row, int64_t col, int32_t sum, uint32_t, uint32_t) const {
    const float of_row = thread.load(row_scale + row);
    float scale = of_row * thread.load(weight_scale + col);
    if (scale > FLT_MAX) scale = FLT_MAX;             // inf * 0 would be NaN where the true result is 0
    if (!is_finite(of_row)) scale = of_row - of_row;  // NaN, as everything in such a row
    float value = static_cast<float>(sum) * scale + (bias == nullptr ? 0.0F : thread.load(bias + col));
    if (activation != Activation::kNone) value = activate(value, activation);
    const int64_t at = row * cols + col;
    if (dtype == DType::kFloat32) {
      thread.store(static_cast<float*>(y) + at, value);
    } else {
      const uint16_t bits =
          dtype == DType::kFloat16 ? Element<Float16>::narrow(value) : Element<BFloat16>::narrow(value);
      thread.store(static_cast<uint16_t*>(y) + at, bits);
    }
  }
};

inline Status check_product(int64_t m, int64_t n, int64_t k) {
  if (m >= 0 && n >= 0 && k >= 0 && k <= kInt8MaxK) return {};
  return Status::invalid("m, n, k: expected at least 0, and k up to " + std::to_string(kInt8MaxK) +
                         ", beyond which int32 sums overflow, got " + std::to_string(m) + ", " + std::to_string(n) +
                         ", " + std::to_string(k));
}

template <class Launcher>
Status launch_int8_matmul(const Launcher& launcher, const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k,
                          int32_t* out) {
  Status status = check_product(m, n, k);
  if (status.ok()) status = check_pointer("a", a, m * k);
  if (status.ok()) status = check_pointer("b", b, n * k);
  if (status.ok()) status = check_pointer("out", out, m * n);
  if (!status.ok()) return status;
  const TiledProduct<Int8Product, Int32Output> kernel = {operand_of(a, m, k), operand_of(b, n, k), {out, n}};
  return launcher.run(kernel, kernel.blocks());
}

// Row scales, then quantized rows.
inline size_t linear_scale_bytes(int64_t m) { return static_cast<size_t>(ceil_div(m * 4, 16) * 16); }
inline size_t linear_workspace_bytes(int64_t m, int64_t k) {
  return linear_scale_bytes(m) + static_cast<size_t>(m * k);
}

inline Status check_linear(const Int8Linear& args) {
  Status status = check_product(args.m, args.n, args.k);
  if (status.ok()) status = check_pointer("x", args.x, args.m * args.k);
  if (status.ok()) status = check_pointer("weight", args.weight, args.n * args.k);
  if (status.ok()) status = check_pointer("weight_scale", args.weight_scale, args.n);
  if (status.ok()) status = check_pointer("y", args.y, args.m * args.n);
  if (status.ok()) status = check_pointer("workspace", args.workspace, args.m);
  return status;
}

template <class Launcher>
Status launch_int8_linear(const Launcher& launcher, const Int8Linear& args) {
  Status status = check_linear(args);
  if (!status.ok() || args.m * args.n == 0) return status;
  float* scale = static_cast<float*>(args.workspace);
  int8_t* q = static_cast<int8_t*>(args.workspace) + linear_scale_bytes(args.m);
  status = launch_quantize_rows(launcher, args.dtype, args.x, args.m, args.k, q, scale);
  if (!status.ok()) return status;
  const ScaledOutput output = {args.y, args.dtype, args.n, scale, args.weight_scale, args.bias, args.activation};
  const TiledProduct<Int8Product, ScaledOutput> kernel = {operand_of(q, args.m, args.k),
                                                          operand_of(args.weight, args.n, args.k), output};
  return launcher.run(kernel, kernel.blocks());
}

}  // namespace kdq::cuda
