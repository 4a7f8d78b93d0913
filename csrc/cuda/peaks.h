// What limits a GPU: loops that do nothing but one instruction, their operands in registers, and a loop that reads.
// Whoever launches them times them.
#pragma once

#include <random>

#include "core/checks.h"
#include "cuda/reduce.h"
#include "kdq/cuda.h"

namespace kdq::cuda {

constexpr int kPeakSums = 8;  // independent sums of a thread: with 8 warps on each scheduler they hide the latency

// Of a warp: four words of a and two of b for every lane.
struct PeakOperands {
  uint32_t a[kWarp][4];
  uint32_t b[kWarp][2];
};

// A loop's members: Sum, what a thread has kPeakSums of; kOperations, of one step of a warp on one sum (a multiply and
// an add count two); kKept and kSet, the bits of random words that operands keep, and those that are set; step().

struct Int8Loop {
  using Sum = int32_t[4];
  static constexpr int64_t kOperations = int64_t{2} * 16 * 8 * 32;
  static constexpr uint32_t kKept = 0xFFFFFFFFU;
  static constexpr uint32_t kSet = 0;
  template <class Thread>
  static KDQ_DEVICE void step(Thread& thread, Sum& sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    thread.mma_int8(sum, a, b);
  }
};

struct BinaryLoop {
  using Sum = int32_t[4];
  static constexpr int64_t kOperations = int64_t{2} * 16 * 8 * 256;
  static constexpr uint32_t kKept = 0xFFFFFFFFU;
  static constexpr uint32_t kSet = 0;
  template <class Thread>
  static KDQ_DEVICE void step(Thread& thread, Sum& sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    thread.mma_and(sum, a, b);
  }
};

struct BFloat16Loop {
  using Sum = float[4];
  static constexpr int64_t kOperations = int64_t{2} * 16 * 8 * 16;
  // Two values of magnitude 1 to 2, of either sign.
  static constexpr uint32_t kKept = 0x807F807FU;
  static constexpr uint32_t kSet = 0x3F803F80U;
  template <class Thread>
  static KDQ_DEVICE void step(Thread& thread, Sum& sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    thread.mma_bf16(sum, a, b);
  }
};

struct Float32Loop {
  using Sum = float[4];
  static constexpr int64_t kOperations = int64_t{2} * 4 * kWarp;
  // Magnitude 1/2 to 1, of either sign: sum * a + b stays finite.
  static constexpr uint32_t kKept = 0x807FFFFFU;
  static constexpr uint32_t kSet = 0x3F000000U;
  template <class Thread>
  static KDQ_DEVICE void step(Thread&, Sum& sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const float factor = float_of(a[0]);
    const float term = float_of(b[0]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = fmaf(sum[i], factor, term);
  }
};

// Every block does the same; out: [blocks, kPeakThreads], all that a thread's sums are, added up.
template <class Loop>
struct ArithmeticPeak {
  static constexpr int kThreads = kPeakThreads;
  struct Shared {};

  PeakOperands operands;
  int64_t steps;
  float* out;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    uint32_t a[4];
    uint32_t b[2];
    const int lane = thread.index() % kWarp;
    for (int i = 0; i < 4; ++i) a[i] = operands.a[lane][i];
    for (int i = 0; i < 2; ++i) b[i] = operands.b[lane][i];
    typename Loop::Sum sums[kPeakSums] = {};
    for (int64_t s = 0; s < steps; ++s) {
#pragma unroll
      for (int j = 0; j < kPeakSums; ++j) Loop::step(thread, sums[j], a, b);
    }
    float total = 0.0F;
#pragma unroll
    for (int j = 0; j < kPeakSums; ++j) {
      for (int i = 0; i < 4; ++i) total += static_cast<float>(sums[j][i]);
    }
    thread.store(out + thread.block() * kThreads + thread.index(), total);
  }
};

// Reads pieces of 16 bytes, all blocks side by side; out: [blocks, kPeakThreads], the xor of a thread's words.
struct ReadPeak {
  static constexpr int kThreads = kPeakThreads;
  static constexpr int kAtOnce = 8;  // loads of a thread that are on their way together
  struct Shared {};

  const Words<16>* source;
  int64_t pieces;
  int64_t stride;  // of a thread: the threads of all blocks
  uint32_t* out;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t first = thread.block() * kThreads + thread.index();
    uint32_t all = 0;
    for (int64_t p = first; p < pieces; p += kAtOnce * stride) {
      Words<16> words[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        words[i] = p + i * stride < pieces ? thread.load(source + p + i * stride) : Words<16>{};
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        for (int w = 0; w < 4; ++w) all ^= words[i].word[w];
      }
    }
    thread.store(out + first, all);
  }
};

// ---- for launching -------------------------------------------------------------------------------------------------

inline Status check_peak(int64_t blocks, const void* out) {
  if (blocks < 1) return Status::invalid("blocks: expected at least 1, got " + std::to_string(blocks));
  return check_pointer("out", out, blocks);
}

// Random, as a GPU draws less power on zeros and may run faster.
template <class Loop>
PeakOperands peak_operands() {
  PeakOperands operands;
  std::mt19937 random(1);
  const auto word = [&] { return (static_cast<uint32_t>(random()) & Loop::kKept) | Loop::kSet; };
  for (int lane = 0; lane < kWarp; ++lane) {
    for (uint32_t& of_a : operands.a[lane]) of_a = word();
    for (uint32_t& of_b : operands.b[lane]) of_b = word();
  }
  return operands;
}

template <class Loop, class Launcher>
Status launch_loop(const Launcher& launcher, int64_t blocks, int64_t steps, float* out, int64_t* operations) {
  *operations = blocks * (kPeakThreads / kWarp) * steps * kPeakSums * Loop::kOperations;
  return launcher.run(ArithmeticPeak<Loop>{peak_operands<Loop>(), steps, out}, blocks);
}

template <class Launcher>
Status launch_arithmetic_peak(const Launcher& launcher, PeakLoop loop, int64_t blocks, int64_t steps, float* out,
                              int64_t* operations) {
  const Status status = check_peak(blocks, out);
  if (!status.ok()) return status;
  if (steps < 1) return Status::invalid("steps: expected at least 1, got " + std::to_string(steps));
  switch (loop) {
    case PeakLoop::kInt8:
      return launch_loop<Int8Loop>(launcher, blocks, steps, out, operations);
    case PeakLoop::kBinary:
      return launch_loop<BinaryLoop>(launcher, blocks, steps, out, operations);
    case PeakLoop::kBFloat16:
      return launch_loop<BFloat16Loop>(launcher, blocks, steps, out, operations);
    case PeakLoop::kFloat32:
      return launch_loop<Float32Loop>(launcher, blocks, steps, out, operations);
  }
  return Status::invalid("loop: expected a PeakLoop, got " + std::to_string(static_cast<int>(loop)));
}

template <class Launcher>
Status launch_read_peak(const Launcher& launcher, const void* source, int64_t bytes, int64_t blocks, uint32_t* out) {
  Status status = check_peak(blocks, out);
  if (status.ok()) status = check_pointer("source", source, bytes);
  if (!status.ok()) return status;
  if (bytes < 16 || bytes % 16 != 0 || !is_aligned(source, 16)) {
    return Status::invalid("source: expected aligned pieces of 16 bytes, got " + std::to_string(bytes) + " bytes");
  }
  return launcher.run(ReadPeak{static_cast<const Words<16>*>(source), bytes / 16, blocks * kPeakThreads, out}, blocks);
}

}  // namespace kdq::cuda
