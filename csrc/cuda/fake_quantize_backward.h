// Gradients of fake-quant on a GPU. One pass over x and grad_y writes grad_x and partial sums for scale and zero point;
// a second launch adds a channel's partial sums in float64. How the sums are cut depends on the shape alone, and so do
// the results' bits.
//
// Where elements of a channel lie together (runs of kShortestRun and more) a warp sums a piece of such a run. Where
// they do not, a thread goes down some rows of [outer, channels * inner], in columns of its own.
#pragma once

#include "cuda/quant_grid.h"
#include "cuda/reduce.h"

namespace kdq::cuda {

constexpr int64_t kShortestRun = 32;

// How the sums are cut. Partial sum (a, c, b), of channel c, lies at (a * channels + c) * width + b.
struct Partials {
  bool columns;    // a thread a column, or a warp a run
  int64_t piece;   // elements of a run that a warp sums; rows that a thread goes down
  int64_t height;  // partial sums of a channel: height * width
  int64_t channels;
  int64_t width;

  int64_t count() const { return height * channels * width; }
  // A single sum a channel is the result itself.
  bool is_final() const { return height * width == 1; }
};

inline Partials partials_of(const QuantShape& s) {
  constexpr int64_t kRunPiece = 1024;
  if (s.channels <= 1 || s.inner >= kShortestRun) {
    return {false, kRunPiece, s.outer, s.channels, ceil_div(s.inner, kRunPiece)};
  }
  // Long pieces make few partial sums, short ones many threads.
  constexpr int64_t kElementsInFlight = 1 << 20;
  int64_t rows = s.outer * s.channels * s.inner / kElementsInFlight;
  rows = rows < 16 ? 16 : rows > 256 ? 256 : rows;
  return {true, rows, ceil_div(s.outer, rows), s.channels, s.inner};
}

// The gradients of one element, added to the sums; returns that of x.
KDQ_DEVICE float add_gradients(const Grid& g, float x, float grad_y, float* scale_sum, float* zero_point_sum) {
  const float before = g.unclamped(x);
  const float q = g.clamp(before);
  const bool inside = before == q;
  *scale_sum += grad_y * (inside ? (g.dequantized(q) - x) * g.inverse : q - g.zero_point);
  *zero_point_sum += inside ? 0.0F : grad_y * -g.scale;
  return inside ? grad_y : 0.0F;
}

template <class T>
struct BackwardArgs {
  const T* grad_y;
  const T* x;
  T* grad_x;              // or nullptr
  float* scale_sum;       // or nullptr
  float* zero_point_sum;  // or nullptr
  int64_t outer;
  bool wide;  // buffers and runs (or rows) are multiples of 16 bytes
  GridView grid;
  Partials partials;

  template <class Thread>
  KDQ_DEVICE void store_sums(Thread& thread, int64_t i, float scale, float zero_point) const {
    if (scale_sum != nullptr) thread.store(scale_sum + i, scale);
    if (zero_point_sum != nullptr) thread.store(zero_point_sum + i, zero_point);
  }
};

template <class T>
struct BackwardRuns {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarp;
  struct Shared {};
  BackwardArgs<T> args;

  int64_t blocks() const { return ceil_div(args.partials.count(), kWarps); }

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const Partials& cut = args.partials;
    const int64_t own = thread.block() * kWarps + thread.index() / kWarp;  // the partial sum of this warp
    if (own >= cut.height * cut.channels * cut.width) return;
    const int64_t run = own / cut.width;
    const int64_t begin = (own - run * cut.width) * cut.piece;
    const int64_t end = begin + cut.piece < args.grid.inner ? begin + cut.piece : args.grid.inner;
    const Grid g = args.grid.at(thread, run % cut.channels);
    float scale_sum = 0.0F;
    float zero_point_sum = 0.0F;
    for (int64_t i = begin + thread.index() % kWarp * kChunk<T>; i < end; i += kWarp * kChunk<T>) {
      const int64_t first = run * args.grid.inner + i;
      float x[kChunk<T>];
      float grad[kChunk<T>];
      load_chunk(thread, args.x + first, args.wide, end - i, x);
      load_chunk(thread, args.grad_y + first, args.wide, end - i, grad);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        if (i + e < end) grad[e] = add_gradients(g, x[e], grad[e], &scale_sum, &zero_point_sum);
      }
      if (args.grad_x != nullptr) store_floats(thread, args.grad_x + first, args.wide, end - i, grad);
    }
    scale_sum = reduce_warp(thread, scale_sum, Sum());
    zero_point_sum = reduce_warp(thread, zero_point_sum, Sum());
    if (thread.index() % kWarp == 0) args.store_sums(thread, own, scale_sum, zero_point_sum);
  }
};

template <class T>
struct BackwardColumns {
  static constexpr int kThreads = 128;
  struct Shared {};
  BackwardArgs<T> args;

  int64_t blocks() const { return ceil_div(args.partials.height * chunks_of_a_row(), kThreads); }
  KDQ_DEVICE int64_t row_length() const { return args.grid.channels * args.grid.inner; }
  int64_t chunks_of_a_row() const { return ceil_div(args.grid.channels * args.grid.inner, kChunk<T>); }

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const Partials& cut = args.partials;
    const int64_t length = row_length();
    const int64_t chunks = (length + kChunk<T> - 1) / kChunk<T>;
    const int64_t own = thread.block() * kThreads + thread.index();
    const int64_t piece = own / chunks;
    const int64_t column = (own - piece * chunks) * kChunk<T>;
    if (piece >= cut.height) return;
    Grid grids[kChunk<T>];
    float scale_sums[kChunk<T>] = {};
    float zero_point_sums[kChunk<T>] = {};
    GridCursor<Thread> cursor(thread, args.grid, column);
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) grids[e] = column + e < length ? cursor.next() : Grid{};
    const int64_t end = (piece + 1) * cut.piece < args.outer ? (piece + 1) * cut.piece : args.outer;
    for (int64_t row = piece * cut.piece; row < end; ++row) {
      const int64_t first = row * length + column;
      float x[kChunk<T>];
      float grad[kChunk<T>];
      load_chunk(thread, args.x + first, args.wide, length - column, x);
      load_chunk(thread, args.grad_y + first, args.wide, length - column, grad);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        if (column + e < length) {
          grad[e] = add_gradients(grids[e], x[e], grad[e], &scale_sums[e], &zero_point_sums[e]);
        }
      }
      if (args.grad_x != nullptr) store_floats(thread, args.grad_x + first, args.wide, length - column, grad);
    }
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) {
      if (column + e < length) args.store_sums(thread, piece * length + column + e, scale_sums[e], zero_point_sums[e]);
    }
  }
};

// A block adds the partial sums of one channel.
struct AddPartials {
  static constexpr int kThreads = 128;
  struct Shared {
    double sums[kThreads / kWarp];
  };
  const float* partial;
  float* total;  // [channels]
  int64_t height;
  int64_t channels;
  int64_t width;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t channel = thread.block();
    double sum = 0.0;
    for (int64_t i = thread.index(); i < height * width; i += kThreads) {
      const int64_t a = i / width;
      sum += static_cast<double>(thread.load(partial + (a * channels + channel) * width + (i - a * width)));
    }
    sum = reduce_block(thread, shared.sums, sum, Sum());
    if (thread.index() == 0) thread.store(total + channel, static_cast<float>(sum));
  }
};

inline size_t backward_workspace_bytes(const QuantShape& shape) {
  const Partials partials = partials_of(shape);
  return partials.is_final() ? 0 : static_cast<size_t>(partials.count()) * 2 * sizeof(float);
}

template <class T, class Launcher>
Status launch_backward_pass(const Launcher& launcher, const BackwardArgs<T>& args) {
  if (args.partials.columns) {
    const BackwardColumns<T> kernel = {args};
    return launcher.run(kernel, kernel.blocks());
  }
  const BackwardRuns<T> kernel = {args};
  return launcher.run(kernel, kernel.blocks());
}

template <class Launcher>
Status launch_add_partials(const Launcher& launcher, const Partials& partials, const float* partial, float* total) {
  if (total == nullptr || partial == total) return {};
  return launcher.run(AddPartials{partial, total, partials.height, partials.channels, partials.width},
                      partials.channels);
}

template <class Launcher>
Status launch_fake_quantize_backward(const Launcher& launcher, DType dtype, const void* grad_y, const void* x,
                                     void* grad_x, float* grad_scale, float* grad_zero_point, const QuantShape& shape,
                                     const QuantGrid& grid, void* workspace) {
  Status status = check_quant_call(shape, grid, "x", x, "grad_y", grad_y);
  if (!status.ok()) return status;
  const Partials partials = partials_of(shape);
  const bool needs_workspace = (grad_scale != nullptr || grad_zero_point != nullptr) && !partials.is_final();
  float* scale_sum = grad_scale;
  float* zero_point_sum = grad_zero_point;
  if (needs_workspace) {
    status = check_pointer("workspace", workspace, partials.count());
    if (!status.ok()) return status;
    scale_sum = grad_scale == nullptr ? nullptr : static_cast<float*>(workspace);
    zero_point_sum = grad_zero_point == nullptr ? nullptr : static_cast<float*>(workspace) + partials.count();
  }
  status = for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t run = partials.columns ? shape.channels * shape.inner : shape.inner;
    const bool one_run = partials.columns ? shape.outer == 1 : shape.outer * shape.channels == 1;
    const bool aligned = is_aligned(grad_y, 16) && is_aligned(x, 16) && is_aligned(grad_x, 16);
    const BackwardArgs<T> args = {static_cast<const T*>(grad_y),
                                  static_cast<const T*>(x),
                                  static_cast<T*>(grad_x),
                                  scale_sum,
                                  zero_point_sum,
                                  shape.outer,
                                  aligned && (one_run || run % kChunk<T> == 0),
                                  view_of(shape, grid),
                                  partials};
    return launch_backward_pass(launcher, args);
  });
  if (status.ok()) status = launch_add_partials(launcher, partials, scale_sum, grad_scale);
  if (status.ok()) status = launch_add_partials(launcher, partials, zero_point_sum, grad_zero_point);
  return status;
}

}  // namespace kdq::cuda
