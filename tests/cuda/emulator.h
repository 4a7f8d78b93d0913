// Runs kernels of csrc/cuda on the CPU: the very same bodies, as templates on the thread type, with every thread of a
// block a fiber of its own that stops at barriers and at exchanges within its warp.
//
// What it checks beside results: alignment of every access, that all threads of a block (lanes of a warp) meet at each
// barrier (exchange), that somebody can go on, and, for buffers handed to watch(), that every byte is written exactly
// once. It runs the threads in ascending or descending order, so that a missing barrier shows in one of the two; a
// third order lets the lanes of warps drift apart. It has no weak memory model: what only the hardware can show, it
// does not.
#pragma once

#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/elements.h"
#include "kdq/status.h"

namespace kdq::emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::exit(1);
}

// ---- bytes written, of one buffer ----------------------------------------------------------------------------------

class Watch {
 public:
  void start(const void* base, size_t bytes) {
    base_ = static_cast<const char*>(base);
    count_.assign(bytes, 0);
  }
  void written(const void* p, size_t bytes) {
    const char* at = static_cast<const char*>(p);
    if (at < base_ || at >= base_ + count_.size()) return;
    if (at + bytes > base_ + count_.size()) fail("a store passes the end of a buffer");
    for (size_t i = 0; i < bytes; ++i) ++count_[static_cast<size_t>(at - base_) + i];
  }
  bool all_once() const {
    for (uint8_t n : count_) {
      if (n != 1) return false;
    }
    return true;
  }

 private:
  const char* base_ = nullptr;
  std::vector<uint8_t> count_;
};

inline Watch& watch() {
  static Watch instance;
  return instance;
}

// ---- threads --------------------------------------------------------------------------------------------------------

enum class Order { kAscending, kDescending, kByLane };
constexpr Order kOrders[] = {Order::kAscending, Order::kDescending, Order::kByLane};

enum class State { kReady, kAtBarrier, kAtExchange, kBlocked, kYielded, kDone };

// What the lanes of a warp show each other. Two slots, used in turn: a lane may be one exchange ahead of another.
struct Exchange {
  char bytes[2][cuda::kWarp][32];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kDone;
  const std::function<bool()>* can_go_on = nullptr;  // while blocked
  int turn = 0;
};

// What one lane has of the factors of an mma.
struct Fragments {
  uint32_t a[4];
  uint32_t b[2];
};
using WarpFragments = std::array<Fragments, cuda::kWarp>;

class Thread {
 public:
  int64_t block() const { return block_; }
  int index() const { return index_; }

  void sync() { wait(State::kAtBarrier); }

  template <class V>
  V shuffle_xor(V value, int mask) {
    V other;
    std::memcpy(&other, show(&value, sizeof(V))[lane() ^ mask], sizeof(V));
    return other;
  }

  template <class V>
  V load(const V* p) const {
    check_alignment(p, alignof(V));
    V value;
    std::memcpy(&value, p, sizeof(V));
    return value;
  }
  template <class V>
  void store(V* p, const V& value) const {
    check_alignment(p, alignof(V));
    watch().written(p, sizeof(V));
    std::memcpy(p, &value, sizeof(V));
  }

  int popcount(uint32_t word) const { return __builtin_popcount(word); }

  int32_t byte_sum(uint32_t word) const {
    int32_t sum = 0;
    for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(word >> i & 255U);
    return sum;
  }

  void mma_int8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
  void mma_and(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
  void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
  void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

 protected:
  WarpFragments fragments(const uint32_t (&a)[4], const uint32_t (&b)[2]);
  template <class Half>
  void mma_pairs(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

  int lane() const { return index_ % cuda::kWarp; }

  static void check_alignment(const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("an access is not aligned");
  }

  void wait(State state) {
    fiber_->state = state;
    swapcontext(&fiber_->context, scheduler_);
  }

  void wait_until(const std::function<bool()>& can_go_on) {
    if (can_go_on()) return;
    fiber_->can_go_on = &can_go_on;
    wait(State::kBlocked);
  }

  // Everyone else who can goes on first.
  void yield() { wait(State::kYielded); }

 private:
  friend class Block;

  // Lays `bytes` open to the warp and returns what its lanes lay open.
  const char (*show(const void* value, size_t bytes))[32] {
    if (bytes > 32) fail("an exchange is too large");
    const int turn = fiber_->turn;
    fiber_->turn = 1 - turn;
    std::memcpy(exchange_->bytes[turn][lane()], value, bytes);
    wait(State::kAtExchange);
    return exchange_->bytes[turn];
  }

  int64_t block_ = 0;
  int index_ = 0;
  Fiber* fiber_ = nullptr;
  Exchange* exchange_ = nullptr;
  ucontext_t* scheduler_ = nullptr;
};

// ---- mma, by PTX's description of the fragments --------------------------------------------------------------------
// Element i of a lane's fragment (i counts bytes, bits, or halves), where `unit` of them make a word of 4 bytes:
//   a: row lane / 4 (+ 8 in words 1 and 3), k (lane % 4) * unit + i % unit (+ 4 unit in words 2 and 3)
//   b: column lane / 4, k likewise (+ 4 unit in word 1)
//   c: row lane / 4 (+ 8 for i >= 2), column (lane % 4) * 2 + i % 2

inline uint32_t a_word(const WarpFragments& warp, int row, int k_word) {
  return warp[row % 8 * 4 + k_word % 4].a[(row >= 8 ? 1 : 0) + (k_word >= 4 ? 2 : 0)];
}
inline uint32_t b_word(const WarpFragments& warp, int col, int k_word) {
  return warp[col * 4 + k_word % 4].b[k_word >= 4 ? 1 : 0];
}

template <class Sum, class WordProduct>
void multiply(const WarpFragments& warp, int lane, Sum (&c)[4], WordProduct product) {
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i >= 2 ? 8 : 0);
    const int col = lane % 4 * 2 + i % 2;
    for (int w = 0; w < 8; ++w) c[i] += product(a_word(warp, row, w), b_word(warp, col, w));
  }
}

// Of all lanes, each of which shows its own.
inline WarpFragments Thread::fragments(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments own;
  std::memcpy(own.a, a, sizeof(own.a));
  std::memcpy(own.b, b, sizeof(own.b));
  WarpFragments warp;
  const auto* shown = show(&own, sizeof(own));
  for (size_t lane = 0; lane < warp.size(); ++lane) std::memcpy(&warp[lane], shown[lane], sizeof(own));
  return warp;
}

inline int32_t int8_product(uint32_t a, uint32_t b) {
  int32_t sum = 0;
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i & 255U) * static_cast<int8_t>(b >> i & 255U);
  return sum;
}

inline void Thread::mma_int8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply(fragments(a, b), lane(), c, int8_product);
}

inline void Thread::mma_and(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply(fragments(a, b), lane(), c, [](uint32_t x, uint32_t y) { return __builtin_popcount(x & y); });
}

template <class Half>
double pair_product(uint32_t a, uint32_t b) {
  const auto widen = [](uint32_t half) { return double{cuda::Element<Half>::widen(static_cast<uint16_t>(half))}; };
  return widen(a & 0xFFFFU) * widen(b & 0xFFFFU) + widen(a >> 16) * widen(b >> 16);
}

// The next float32 towards zero, as the hardware was seen to cut; what PTX promises is less.
inline float cut(double sum) {
  const auto nearest = static_cast<float>(sum);
  const bool is_too_large = std::isfinite(nearest) && std::fabs(double{nearest}) > std::fabs(sum);
  return is_too_large ? std::nextafterf(nearest, 0.0F) : nearest;
}

template <class Half>
void Thread::mma_pairs(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  double sums[4] = {c[0], c[1], c[2], c[3]};
  multiply(fragments(a, b), lane(), sums, pair_product<Half>);
  for (int i = 0; i < 4; ++i) c[i] = cut(sums[i]);
}

inline void Thread::mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_pairs<BFloat16>(c, a, b);
}
inline void Thread::mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_pairs<Float16>(c, a, b);
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

class Block {
 public:
  explicit Block(int threads) : fibers_(static_cast<size_t>(threads)), exchanges_(fibers_.size() / cuda::kWarp) {
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStack]);
  }

  // body(thread) by every thread of block number `block`. idle(): called when nobody can go on; false if that will not
  // change.
  template <class Body, class Idle>
  void run(int64_t block, Order order, const Body& body, const Idle& idle) {
    for (size_t i = 0; i < fibers_.size(); ++i) start(static_cast<int>(i), block, body);
    while (!is_done()) {
      bool moved = order == Order::kByLane ? run_lanes() : run_warps(order == Order::kDescending);
      moved |= release(0, threads(), State::kAtBarrier, "some threads of a block miss a barrier");
      moved |= wake_yielded(0, 1);
      if (!moved && !idle()) fail("deadlock: no thread can go on");
    }
  }

 private:
  static constexpr size_t kStack = 64 * 1024;

  template <class Body>
  struct Start {
    const Body* body;
    Thread thread;
  };

  template <class Body>
  void start(int i, int64_t block, const Body& body) {
    Fiber& fiber = fibers_[static_cast<size_t>(i)];
    Thread thread;
    thread.block_ = block;
    thread.index_ = i;
    thread.fiber_ = &fiber;
    thread.exchange_ = &exchanges_[static_cast<size_t>(i / cuda::kWarp)];
    thread.scheduler_ = &scheduler_;
    auto* begin = new Start<Body>{&body, thread};
    fiber.state = State::kReady;
    fiber.turn = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler_;
    const auto address = reinterpret_cast<uintptr_t>(begin);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&enter<Body>), 2, static_cast<unsigned>(address >> 32),
                static_cast<unsigned>(address));
  }

  template <class Body>
  static void enter(unsigned high, unsigned low) {
    const uintptr_t address = static_cast<uintptr_t>(high) << 32 | low;
    std::unique_ptr<Start<Body>> begin(reinterpret_cast<Start<Body>*>(address));
    (*begin->body)(begin->thread);
    begin->thread.fiber_->state = State::kDone;
  }

  int threads() const { return static_cast<int>(fibers_.size()); }
  int warps() const { return threads() / cuda::kWarp; }

  // Whether it could.
  bool run_thread(int i) {
    Fiber& fiber = fibers_[static_cast<size_t>(i)];
    const bool can = fiber.state == State::kReady || (fiber.state == State::kBlocked && (*fiber.can_go_on)());
    if (can) swapcontext(&scheduler_, &fiber.context);
    return can;
  }

  bool release_warp(int warp) {
    return release(warp * cuda::kWarp, (warp + 1) * cuda::kWarp, State::kAtExchange,
                   "some lanes of a warp miss an exchange");
  }

  // Each warp until none of its lanes can go on. Whether any did.
  bool run_warps(bool descending) {
    bool moved = false;
    for (int w = 0; w < warps(); ++w) {
      const int warp = descending ? warps() - 1 - w : w;
      do {
        for (int i = 0; i < cuda::kWarp; ++i) {
          moved |= run_thread(warp * cuda::kWarp + (descending ? cuda::kWarp - 1 - i : i));
        }
      } while (release_warp(warp));
    }
    return moved;
  }

  // The same lane of all warps until none of them can go on, then the next.
  bool run_lanes() {
    bool moved = false;
    for (int lane = 0; lane < cuda::kWarp; ++lane) {
      bool again = true;
      while (again) {
        again = false;
        for (int i = lane; i < threads(); i += cuda::kWarp) again |= run_thread(i);
        again |= wake_yielded(lane, cuda::kWarp);
        moved |= again;
      }
    }
    for (int warp = 0; warp < warps(); ++warp) moved |= release_warp(warp);
    return moved;
  }

  // Lets the threads of a range go on if all wait in that state; if some are done or wait elsewhere, the kernel is
  // wrong.
  bool release(int begin, int end, State state, const char* otherwise) {
    int waiting = 0;
    int later = 0;
    for (int i = begin; i < end; ++i) {
      const State own = fibers_[static_cast<size_t>(i)].state;
      waiting += own == state ? 1 : 0;
      later += own == State::kBlocked || own == State::kYielded ? 1 : 0;
    }
    if (waiting == 0 || later > 0) return false;
    if (waiting != end - begin) fail(otherwise);
    for (int i = begin; i < end; ++i) fibers_[static_cast<size_t>(i)].state = State::kReady;
    return true;
  }

  bool wake_yielded(int first, int step) {
    bool any = false;
    for (int i = first; i < threads(); i += step) {
      Fiber& fiber = fibers_[static_cast<size_t>(i)];
      if (fiber.state != State::kYielded) continue;
      fiber.state = State::kReady;
      any = true;
    }
    return any;
  }

  bool is_done() const {
    for (const Fiber& fiber : fibers_) {
      if (fiber.state != State::kDone) return false;
    }
    return true;
  }

  std::vector<Fiber> fibers_;
  std::vector<Exchange> exchanges_;
  ucontext_t scheduler_;
};

}  // namespace kdq::emulator
