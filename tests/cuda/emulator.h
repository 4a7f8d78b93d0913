// Runs kernels of csrc/cuda on the CPU: the very same bodies, as templates on the thread type, with every thread of a
// block a fiber of its own that stops at barriers and at exchanges within its warp.
//
// What it checks beside results: alignment of every access, that all threads of a block (lanes of a warp) meet at each
// barrier (exchange), and, for buffers handed to watch(), that every byte is written exactly once. It runs the threads
// in ascending or descending order, so that a missing barrier shows in one of the two. It has no weak memory model:
// what only the hardware can show, it does not.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/thread.h"
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

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

// What the lanes of a warp show each other. Two slots, used in turn: a lane may be one exchange ahead of another.
struct Exchange {
  char bytes[2][cuda::kWarp][32];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kDone;
  int turn = 0;
};

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

 private:
  friend class Block;

  int lane() const { return index_ % cuda::kWarp; }

  static void check_alignment(const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("an access is not aligned");
  }

  void wait(State state) {
    fiber_->state = state;
    swapcontext(&fiber_->context, scheduler_);
  }

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
// Element i of a lane's fragment (i counts bytes, or bits), where `unit` of them make a word of 4 bytes:
//   a: row lane / 4 (+ 8 in words 1 and 3), k (lane % 4) * unit + i % unit (+ 4 unit in words 2 and 3)
//   b: column lane / 4, k likewise (+ 4 unit in word 1)
//   c: row lane / 4 (+ 8 for i >= 2), column (lane % 4) * 2 + i % 2

struct Fragments {
  uint32_t a[4];
  uint32_t b[2];
};

inline uint32_t a_word(const Fragments (&warp)[cuda::kWarp], int row, int k_word) {
  return warp[row % 8 * 4 + k_word % 4].a[(row >= 8 ? 1 : 0) + (k_word >= 4 ? 2 : 0)];
}
inline uint32_t b_word(const Fragments (&warp)[cuda::kWarp], int col, int k_word) {
  return warp[col * 4 + k_word % 4].b[k_word >= 4 ? 1 : 0];
}

template <class WordProduct>
void multiply(const Fragments (&warp)[cuda::kWarp], int lane, int32_t (&c)[4], WordProduct product) {
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i >= 2 ? 8 : 0);
    const int col = lane % 4 * 2 + i % 2;
    for (int w = 0; w < 8; ++w) c[i] += product(a_word(warp, row, w), b_word(warp, col, w));
  }
}

inline int32_t int8_product(uint32_t a, uint32_t b) {
  int32_t sum = 0;
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i & 255U) * static_cast<int8_t>(b >> i & 255U);
  return sum;
}

inline void Thread::mma_int8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments own;
  std::memcpy(own.a, a, sizeof(own.a));
  std::memcpy(own.b, b, sizeof(own.b));
  Fragments warp[cuda::kWarp];
  const auto* shown = show(&own, sizeof(own));
  for (int lane = 0; lane < cuda::kWarp; ++lane) std::memcpy(&warp[lane], shown[lane], sizeof(own));
  multiply(warp, lane(), c, int8_product);
}

inline void Thread::mma_and(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments own;
  std::memcpy(own.a, a, sizeof(own.a));
  std::memcpy(own.b, b, sizeof(own.b));
  Fragments warp[cuda::kWarp];
  const auto* shown = show(&own, sizeof(own));
  for (int lane = 0; lane < cuda::kWarp; ++lane) std::memcpy(&warp[lane], shown[lane], sizeof(own));
  multiply(warp, lane(), c, [](uint32_t x, uint32_t y) { return __builtin_popcount(x & y); });
}

// ---- blocks
// ------------------------------------------------------------------------------------------------------------

class Block {
 public:
  explicit Block(int threads) : fibers_(static_cast<size_t>(threads)), exchanges_(fibers_.size() / cuda::kWarp) {
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStack]);
  }

  // body(thread) by every thread of block number `block`.
  template <class Body>
  void run(int64_t block, bool descending, const Body& body) {
    for (size_t i = 0; i < fibers_.size(); ++i) start(static_cast<int>(i), block, body);
    const int warps = static_cast<int>(exchanges_.size());
    while (!is_done()) {
      for (int w = 0; w < warps; ++w) run_warp(descending ? warps - 1 - w : w, descending);
      release(0, static_cast<int>(fibers_.size()), State::kAtBarrier, "some threads of a block miss a barrier");
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

  // Until every lane is at a barrier or done.
  void run_warp(int warp, bool descending) {
    const int first = warp * cuda::kWarp;
    bool exchanged = true;
    while (exchanged) {
      for (int i = 0; i < cuda::kWarp; ++i) {
        Fiber& fiber = fibers_[static_cast<size_t>(first + (descending ? cuda::kWarp - 1 - i : i))];
        if (fiber.state == State::kReady) swapcontext(&scheduler_, &fiber.context);
      }
      exchanged = release(first, first + cuda::kWarp, State::kAtExchange, "some lanes of a warp miss an exchange");
    }
  }

  // Lets the threads of a range go on if all wait in that state; if only some do, the kernel is wrong.
  bool release(int begin, int end, State state, const char* otherwise) {
    int waiting = 0;
    for (int i = begin; i < end; ++i) waiting += fibers_[static_cast<size_t>(i)].state == state ? 1 : 0;
    if (waiting == 0) return false;
    if (waiting != end - begin) fail(otherwise);
    for (int i = begin; i < end; ++i) fibers_[static_cast<size_t>(i)].state = State::kReady;
    return true;
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

// Takes the place of StreamLauncher.
class Launcher {
 public:
  explicit Launcher(bool descending) : descending_(descending) {}

  template <class Kernel>
  Status run(const Kernel& kernel, int64_t blocks) const {
    Block block(Kernel::kThreads);
    auto shared = std::make_unique<typename Kernel::Shared>();
    for (int64_t b = 0; b < blocks; ++b) {
      std::memset(static_cast<void*>(shared.get()), 0xA5, sizeof(*shared));  // GPUs leave rubbish there too
      block.run(descending_ ? blocks - 1 - b : b, descending_, [&](Thread& thread) { kernel(thread, *shared); });
    }
    return {};
  }

 private:
  bool descending_;
};

}  // namespace kdq::emulator
