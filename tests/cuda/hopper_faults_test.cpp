// That each of the Hopper kernel's waits, fences and hand-overs is needed, and that the emulator tells when one is
// missing: the kernel runs with threads that leave one out. A run that fails ends its process, so each has its own.
#include <sys/wait.h>
#include <unistd.h>

#include "cuda/binary_gemm.h"
#include "products.h"

namespace kdq::test {
namespace {

enum class Fault {
  kNone,
  kNoWaitForFull,
  kNoWaitForEmpty,
  kOtherParity,
  kNoArrival,
  kNoBytes,
  kNoPublish,
  kNoSyncWarp,
  kNoSyncSome,
  kNoFence,
  kNoCommit,
  kNoWaitForPrevious,
  kNoFinish,
  kPlainDescriptor,
  kOneProductLess,
};

template <Fault kFault>
class FaultyThread : public emulator::HopperThread {
 public:
  using Base = emulator::HopperThread;
  using Base::Base;
  using Sums = int32_t[cuda::kWgmmaSums];

  void wait(cuda::Barrier* barrier, uint32_t parity) {
    const bool copies = index() < cuda::kWarpgroup;
    if (kFault == (copies ? Fault::kNoWaitForEmpty : Fault::kNoWaitForFull)) return;
    Base::wait(barrier, kFault == Fault::kOtherParity && !copies ? parity ^ 1U : parity);
  }
  void arrive(cuda::Barrier* barrier) {
    if (kFault != Fault::kNoArrival) Base::arrive(barrier);
  }
  void arrive_expecting(cuda::Barrier* barrier, uint32_t bytes) {
    Base::arrive_expecting(barrier, kFault == Fault::kNoBytes ? 0 : bytes);
  }
  void publish_barriers() {
    if (kFault != Fault::kNoPublish) Base::publish_barriers();
  }
  void sync_warp() {
    if (kFault != Fault::kNoSyncWarp) Base::sync_warp();
  }
  template <int kNumber, int kThreads>
  void sync_some() {
    if (kFault != Fault::kNoSyncSome) Base::sync_some<kNumber, kThreads>();
  }
  void wgmma_fence() {
    if (kFault != Fault::kNoFence) Base::wgmma_fence();
  }
  void wgmma_commit() {
    if (kFault != Fault::kNoCommit) Base::wgmma_commit();
  }
  void wgmma_wait_for_previous() {
    if (kFault != Fault::kNoWaitForPrevious) Base::wgmma_wait_for_previous();
  }
  void wgmma_finish(Sums& sums) {
    if (kFault != Fault::kNoFinish) Base::wgmma_finish(sums);
  }
  void wgmma_and(Sums& sums, uint64_t a, uint64_t b, bool accumulate) {
    if (kFault == Fault::kOneProductLess && index() == 2 * cuda::kWarpgroup) return;
    const uint64_t plain = kFault == Fault::kPlainDescriptor ? uint64_t{3} << 62 : 0;
    Base::wgmma_and(sums, a & ~plain, b & ~plain, accumulate);
  }
};

// Two tiles of more steps than there are stages, by one block.
struct Problem {
  Size size = {200, 9, 6 * 1024 - 20};
  std::vector<uint64_t> a = packed(normals(static_cast<size_t>(size.m * size.k)), size.m, size.k);
  std::vector<uint64_t> b = packed(normals(static_cast<size_t>(size.n * size.k)), size.n, size.k);
  std::vector<int32_t> expected = std::vector<int32_t>(static_cast<size_t>(size.m * size.n));

  Problem() { require(binary_matmul(a.data(), b.data(), size.m, size.n, size.k, expected.data(), serial_executor())); }
};

template <Fault kFault>
class FaultyLauncher : public Launcher {
 public:
  FaultyLauncher(emulator::Order order, emulator::Timing timing)
      : Launcher(order, timing), order_(order), timing_(timing) {}

  template <class Kernel>
  Status run_resident(const Kernel& kernel, int64_t) const {
    emulator::run_resident<FaultyThread<kFault>>(kernel, 1, order_, timing_);
    return {};
  }

 private:
  emulator::Order order_;
  emulator::Timing timing_;
};

template <Fault kFault>
bool is_right(const Problem& problem, emulator::Order order, emulator::Timing timing) {
  const Size& s = problem.size;
  Buffer<uint64_t> a(problem.a, Place::kEnd);
  Buffer<uint64_t> b(problem.b, Place::kEnd);
  Buffer<int32_t> out(problem.expected.size(), Place::kStart);
  const int64_t bytes = cuda::binary_row_bytes(s.k);
  require(cuda::launch_hopper(FaultyLauncher<kFault>(order, timing), cuda::BinaryProduct(),
                              cuda::operand_of(a.data(), s.m, bytes), cuda::operand_of(b.data(), s.n, bytes),
                              cuda::DotOutput{out.data(), s.n, static_cast<uint32_t>(s.k)}));
  return out.values() == problem.expected;
}

// What a run in a process of its own says: nothing if the result is right.
template <class Run>
std::string complaint(const Run& run) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    if (!run()) emulator::fail("a wrong result");
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[256];
  for (ssize_t n = 0; (n = read(ends[0], part, sizeof(part))) > 0;) text.append(part, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (status != 0 && text.empty()) text = "a crash";
  return text;
}

// All that is said in all the ways to run it.
template <Fault kFault>
std::string complaints(const Problem& problem) {
  std::string all;
  for (const emulator::Timing& timing : emulator::kTimings) {
    for (emulator::Order order : emulator::kOrders) {
      all += complaint([&] { return is_right<kFault>(problem, order, timing); });
    }
  }
  return all;
}

template <Fault kFault>
void is_seen(const Problem& problem, const char* as) {
  const std::string all = complaints<kFault>(problem);
  CHECK(all.find(as) != std::string::npos, "fault %d: expected '%s', got '%s'", static_cast<int>(kFault), as,
        all.c_str());
}

void run_all() {
  const Problem problem;
  CHECK(complaints<Fault::kNone>(problem).empty(), "the kernel as it is");
  is_seen<Fault::kNoWaitForFull>(problem, "more threads arrive");
  is_seen<Fault::kNoWaitForEmpty>(problem, "more threads arrive");
  is_seen<Fault::kOtherParity>(problem, "deadlock");
  is_seen<Fault::kNoArrival>(problem, "deadlock");
  is_seen<Fault::kNoBytes>(problem, "on its way");
  is_seen<Fault::kNoPublish>(problem, "others may not see");
  is_seen<Fault::kNoSyncWarp>(problem, "a wrong result");
  is_seen<Fault::kNoSyncSome>(problem, "a wrong result");
  is_seen<Fault::kNoFence>(problem, "without a fence");
  is_seen<Fault::kNoCommit>(problem, "not committed");
  is_seen<Fault::kNoWaitForPrevious>(problem, "a wrong result");
  is_seen<Fault::kNoFinish>(problem, "on its way");
  is_seen<Fault::kPlainDescriptor>(problem, "128-byte swizzle");
  is_seen<Fault::kOneProductLess>(problem, "miss a product");
}

}  // namespace
}  // namespace kdq::test

int main() { return kdq::test::run_tests(kdq::test::run_all); }
