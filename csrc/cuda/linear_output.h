// What the linear layers share: the float result that a sum becomes, and checks.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/checks.h"
#include "cuda/elements.h"
#include "kdq/cuda.h"

namespace kdq::cuda {

KDQ_DEVICE float activate(float y, Activation activation) {
  if (activation == Activation::kRelu) return y < 0.0F ? 0.0F : y;
  if (activation == Activation::kGelu) return 0.5F * y * erfcf(y * -0.70710678F);
  return y / (1.0F + expf(-y));  // SiLU
}

// activation(sum * (row_scale * weight_scale) + bias), cast.
struct LinearOutput {
  void* y;
  DType dtype;
  int64_t cols;
  const float* weight_scale;  // or nullptr: 1
  const float* bias;          // or nullptr
  Activation activation;

  struct Column {
    float scale;
    float bias;
  };

  template <class Thread>
  KDQ_DEVICE float row(Thread&, int64_t) const {
    return 1.0F;
  }
  template <class Thread>
  KDQ_DEVICE Column column(Thread& thread, int64_t col) const {
    if (col >= cols) return {0.0F, 0.0F};
    return {weight_scale == nullptr ? 1.0F : thread.load(weight_scale + col),
            bias == nullptr ? 0.0F : thread.load(bias + col)};
  }
  template <class Thread>
  KDQ_DEVICE float value(Thread&, float row_scale, const Column& column, float sum) const {
    const float result = scaled(row_scale, column, sum);
    return activation == Activation::kNone ? result : activated(result, activation);
  }
  template <class Body>
  KDQ_DEVICE void with_elements(const Body& body) const {
    cuda::with_elements(dtype, y, body);
  }

  // One result. Not inlined, as whoever has many of them would repeat all of this; Tile::store() is for these.
  template <class Thread>
  KDQ_DEVICE_CALL void store(Thread& thread, int64_t row, int64_t col, float sum, float row_scale) const {
    const float result = scaled(row_scale, column(thread, col), sum);
    store_as(thread, dtype, y, row * cols + col,
             activation == Activation::kNone ? result : activate(result, activation));
  }

 private:
  static KDQ_DEVICE float scaled(float row_scale, const Column& column, float sum) {
    float scale = row_scale * column.scale;
    if (scale > FLT_MAX) scale = FLT_MAX;                      // inf * 0 would be NaN where the true result is 0
    if (!is_finite(row_scale)) scale = row_scale - row_scale;  // NaN, as everything in such a row
    return sum * scale + column.bias;
  }

  // Not inlined: a thread has up to 64 results, and each would bring all of this.
  static KDQ_DEVICE_CALL float activated(float y, Activation activation) { return activate(y, activation); }
};

inline LinearOutput linear_output(const Int8Linear& args) {
  return {args.y, args.dtype, args.n, args.weight_scale, args.bias, args.activation};
}

inline Status check_linear_pointers(const Int8Linear& args) {
  Status status = check_pointer("x", args.x, args.m * args.k);
  if (status.ok()) status = check_pointer("weight", args.weight, args.n * args.k);
  if (status.ok()) status = check_pointer("weight_scale", args.weight_scale, args.n);
  if (status.ok()) status = check_pointer("y", args.y, args.m * args.n);
  return status;
}

}  // namespace kdq::cuda
