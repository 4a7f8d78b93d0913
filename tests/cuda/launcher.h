// Takes the place of StreamLauncher: runs kernels on the emulator.
#pragma once

#include <cstdlib>

#include "cuda/product.h"
#include "hopper_emulator.h"

namespace kdq::emulator {

// A kernel that stays on its multiprocessor, which has shared memory at a multiple of 1024.
template <class EmulatedThread, class Kernel>
void run_resident(const Kernel& kernel, int64_t blocks, Order order, Timing timing) {
  using Shared = typename Kernel::Shared;
  static_assert(sizeof(Shared) <= 227 * 1024, "what a block may have");
  const std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(1024, (sizeof(Shared) + 1023) / 1024 * 1024),
                                                      std::free);
  Block block(Kernel::kThreads);
  for (int64_t b = 0; b < blocks; ++b) {
    std::memset(memory.get(), kRubbish, sizeof(Shared));
    HopperBlock hopper(static_cast<char*>(memory.get()), sizeof(Shared), timing);
    const auto body = [&](Thread& thread) {
      EmulatedThread own(thread, blocks, &hopper);
      kernel(own, *static_cast<Shared*>(memory.get()));
      own.check_end();
    };
    block.run(order == Order::kDescending ? blocks - 1 - b : b, order, body, [&] { return hopper.deliver(); });
    hopper.check_end();
  }
}

class Launcher {
 public:
  explicit Launcher(bool descending) : Launcher(descending ? Order::kDescending : Order::kAscending, {}) {}
  Launcher(Order order, Timing timing) : order_(order), timing_(timing) {}

  template <class Kernel>
  Status run(const Kernel& kernel, int64_t blocks) const {
    Block block(Kernel::kThreads);
    auto shared = std::make_unique<typename Kernel::Shared>();
    for (int64_t b = 0; b < blocks; ++b) {
      std::memset(static_cast<void*>(shared.get()), kRubbish, sizeof(*shared));  // GPUs leave rubbish there too
      const auto body = [&](Thread& thread) { kernel(thread, *shared); };
      block.run(order_ == Order::kDescending ? blocks - 1 - b : b, order_, body, [] { return false; });
    }
    return {};
  }

  // The kernels of product.h are tested as for a GPU that has no others.
  Status use_hopper(bool* use) const {
    *use = false;
    return {};
  }

  Status tensor_map(const cuda::Operand& rows, int box_rows, cuda::TensorMap* map) const {
    *map = tensor_map_of({rows.data, rows.rows, rows.row_bytes, box_rows});
    return {};
  }

  template <class Kernel>
  Status run_resident(const Kernel& kernel, int64_t most) const {
    constexpr int64_t kMultiprocessors = 2;
    emulator::run_resident<HopperThread>(kernel, most < kMultiprocessors ? most : kMultiprocessors, order_, timing_);
    return {};
  }

 private:
  Order order_;
  Timing timing_;
};

}  // namespace kdq::emulator
