// The binary family's products on a GPU: binary_matmul, and the layers whose signs are packed first and whose results
// become floats or bits in registers.
#pragma once

#include "core/checks.h"
#include "cuda/signs.h"
#include "cuda/small_product.h"
#include "kdq/binary_gemm.h"
#include "kdq/cuda.h"

namespace kdq::cuda {

// k - 2 * different. Unsigned steps wrap where k is near 2^31; the result fits.
KDQ_DEVICE int32_t dot_of(uint32_t k, int32_t different) {
  return static_cast<int32_t>(k - 2U * static_cast<uint32_t>(different));
}

struct DotOutput {
  static constexpr bool kBits = false;
  int32_t* out;
  int64_t cols;
  uint32_t k;

  template <class Thread>
  KDQ_DEVICE void store(Thread& thread, int64_t row, int64_t col, int32_t different) const {
    thread.store(out + row * cols + col, dot_of(k, different));
  }
  template <class Thread>
  KDQ_DEVICE Nothing row(Thread&, int64_t) const {
    return {};
  }
  template <class Thread>
  KDQ_DEVICE Nothing column(Thread&, int64_t) const {
    return {};
  }
  template <class Thread>
  KDQ_DEVICE int32_t value(Thread&, Nothing, Nothing, int32_t different) const {
    return dot_of(k, different);
  }
  template <class Body>
  KDQ_DEVICE void with_elements(const Body& body) const {
    body(out);
  }
};

// dot * weight_scale + bias, cast.
struct ScaledDotOutput {
  static constexpr bool kBits = false;
  void* y;
  DType dtype;
  int64_t cols;
  uint32_t k;
  const float* weight_scale;
  const float* bias;  // or nullptr

  struct Column {
    float scale;
    float bias;
  };

  // One result, not inlined: Tile::store() is for many.
  template <class Thread>
  KDQ_DEVICE_CALL void store(Thread& thread, int64_t row, int64_t col, int32_t different) const {
    store_as(thread, dtype, y, row * cols + col, value(thread, {}, column(thread, col), different));
  }
  template <class Thread>
  KDQ_DEVICE Nothing row(Thread&, int64_t) const {
    return {};
  }
  template <class Thread>
  KDQ_DEVICE Column column(Thread& thread, int64_t col) const {
    if (col >= cols) return {0.0F, 0.0F};
    return {thread.load(weight_scale + col), bias == nullptr ? 0.0F : thread.load(bias + col)};
  }
  template <class Thread>
  KDQ_DEVICE float value(Thread&, Nothing, const Column& column, int32_t different) const {
    return scaled(column, dot_of(k, different));
  }
  static KDQ_DEVICE float scaled(const Column& column, int32_t dot) {
    return static_cast<float>(dot) * column.scale + column.bias;
  }
  template <class Body>
  KDQ_DEVICE void with_elements(const Body& body) const {
    cuda::with_elements(dtype, y, body);
  }
};

// Set, which means -1, where dot < threshold.
struct ThresholdOutput {
  static constexpr bool kBits = true;
  uint8_t* bits;
  int64_t row_bytes;
  int64_t cols;
  uint32_t k;
  const int32_t* threshold;

  template <class Thread>
  KDQ_DEVICE uint32_t bit(Thread& thread, int64_t col, int32_t different) const {
    return col < cols && dot_of(k, different) < thread.load(threshold + col) ? 1U : 0U;
  }
};

inline int64_t binary_row_bytes(int64_t k) { return binary_words(k) * static_cast<int64_t>(sizeof(uint64_t)); }

template <class Launcher>
Status launch_binary_matmul(const Launcher& launcher, const uint64_t* a_bits, const uint64_t* b_bits, int64_t m,
                            int64_t n, int64_t k, int32_t* out) {
  Status status = check_binary_sizes(m, n, k);
  if (status.ok()) status = check_pointer("a_bits", a_bits, m * k);
  if (status.ok()) status = check_pointer("b_bits", b_bits, n * k);
  if (status.ok()) status = check_pointer("out", out, m * n);
  if (!status.ok()) return status;
  return launch_small_or_tiled(launcher, BinaryProduct(), operand_of(a_bits, m, binary_row_bytes(k)),
                               operand_of(b_bits, n, binary_row_bytes(k)), DotOutput{out, n, static_cast<uint32_t>(k)});
}

// The input of a layer: signs, or values whose signs are packed into the workspace, of m * binary_row_bytes(k).
struct BinaryInput {
  DType dtype;
  const void* x;           // [m, k], or nullptr
  const uint64_t* x_bits;  // [m, binary_words(k)], or nullptr
  void* workspace;
};

template <class Launcher>
Status launch_signs(const Launcher& launcher, const BinaryInput& input, int64_t m, int64_t n, int64_t k,
                    const uint64_t* weight_bits, const uint64_t** bits) {
  Status status = check_binary_sizes(m, n, k);
  if (status.ok()) status = check_pointer("weight_bits", weight_bits, n * k);
  if (!status.ok()) return status;
  if (input.x_bits != nullptr) {
    *bits = input.x_bits;
    return {};
  }
  status = check_pointer("x", input.x, m * k);
  if (status.ok()) status = check_pointer("workspace", input.workspace, m * k);
  *bits = static_cast<uint64_t*>(input.workspace);
  if (!status.ok() || m * n == 0) return status;
  return launch_pack_signs(launcher, input.dtype, input.x, m, k, static_cast<uint64_t*>(input.workspace));
}

template <class Launcher>
Status launch_binary_linear(const Launcher& launcher, const kdq::BinaryLinear& args, void* workspace) {
  const uint64_t* bits = nullptr;
  Status status = check_pointer("y", args.y, args.m * args.n);
  if (status.ok()) status = check_pointer("weight_scale", args.weight_scale, args.n);
  if (status.ok()) {
    status = launch_signs(launcher, {args.dtype, args.x, args.x_bits, workspace}, args.m, args.n, args.k,
                          args.weight_bits, &bits);
  }
  if (!status.ok()) return status;
  const ScaledDotOutput output = {args.y,   args.dtype, args.n, static_cast<uint32_t>(args.k), args.weight_scale,
                                  args.bias};
  return launch_small_or_tiled(launcher, BinaryProduct(), operand_of(bits, args.m, binary_row_bytes(args.k)),
                               operand_of(args.weight_bits, args.n, binary_row_bytes(args.k)), output);
}

template <class Launcher>
Status launch_binary_threshold(const Launcher& launcher, const kdq::BinaryThreshold& args, void* workspace) {
  const uint64_t* bits = nullptr;
  Status status = check_pointer("y_bits", args.y_bits, args.m * args.n);
  if (status.ok()) status = check_pointer("threshold", args.threshold, args.n);
  if (status.ok()) {
    status = launch_signs(launcher, {args.dtype, args.x, args.x_bits, workspace}, args.m, args.n, args.k,
                          args.weight_bits, &bits);
  }
  if (!status.ok()) return status;
  const ThresholdOutput output = {reinterpret_cast<uint8_t*>(args.y_bits), binary_row_bytes(args.n), args.n,
                                  static_cast<uint32_t>(args.k), args.threshold};
  return launch_small_or_tiled(launcher, BinaryProduct(), operand_of(bits, args.m, binary_row_bytes(args.k)),
                               operand_of(args.weight_bits, args.n, binary_row_bytes(args.k)), output);
}

}  // namespace kdq::cuda
