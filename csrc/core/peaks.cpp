// Measures the machine's limits: runs the ISA's peak loops, and a large copy, on all the threads at once.
#include "kdq/peaks.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/kernel_choice.h"
#include "core/peaks_kernels.h"

namespace kdq {
namespace {

constexpr KernelChoice<PeakKernels> kChoices[] = {
    {Isa::kReference, CpuExtra::kNone, &kPeaksReference},
#if defined(KDQ_HAVE_X86)
    {Isa::kAvx2, CpuExtra::kNone, &kPeaksAvx2},              // vpmaddwd
    {Isa::kAvx2, CpuExtra::kAvxVnni, &kPeaksAvxVnni},        // vpdpbusd
    {Isa::kAvx512, CpuExtra::kNone, &kPeaksAvx512},          // vpmaddwd
    {Isa::kAvx512Vnni, CpuExtra::kNone, &kPeaksAvx512Vnni},  // vpdpbusd
#endif
};

constexpr KernelChoice<PeakKernels> kBinaryChoices[] = {
    {Isa::kReference, CpuExtra::kNone, &kPeaksReference},
#if defined(KDQ_HAVE_X86)
    {Isa::kAvx2, CpuExtra::kNone, &kPeaksAvx2},
    {Isa::kAvx512, CpuExtra::kNone, &kPeaksAvx512},
    {Isa::kAvx512Vnni, CpuExtra::kVpopcntdq, &kPeaksAvx512Vpopcntdq},
#endif
};

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Runs work(thread) on `threads` threads that start together and returns the wall time from the start to the last end.
double time_together(int threads, const std::function<void(int)>& work) {
  std::mutex mutex;
  std::condition_variable start_signal;
  bool started = false;
  std::vector<std::thread> workers;
  for (int t = 1; t < threads; ++t) {
    workers.emplace_back([&, t] {
      {
        std::unique_lock<std::mutex> lock(mutex);
        start_signal.wait(lock, [&] { return started; });
      }
      work(t);
    });
  }
  const Clock::time_point start = Clock::now();
  {
    std::lock_guard<std::mutex> lock(mutex);
    started = true;
  }
  start_signal.notify_all();
  work(0);
  for (std::thread& worker : workers) worker.join();
  return seconds_since(start);
}

// The best rate (units a second) over rounds of `repeat` repetitions, where once(thread) returns the units of one.
double best_rate(int threads, double seconds, const std::function<double(int)>& once) {
  std::vector<double> units(static_cast<size_t>(threads));
  int64_t repeat = 1;
  double best = 0;
  const Clock::time_point start = Clock::now();
  do {
    const double elapsed = time_together(threads, [&](int t) {
      units[static_cast<size_t>(t)] = 0;
      for (int64_t i = 0; i < repeat; ++i) units[static_cast<size_t>(t)] += once(t);
    });
    double total = 0;
    for (double u : units) total += u;
    best = std::max(best, total / elapsed);
    // Rounds of an eighth of the time: long against the start of threads, short enough that one is undisturbed.
    if (elapsed < seconds / 8)
      repeat = std::max(repeat + 1, std::min(2 * repeat, static_cast<int64_t>(repeat * seconds / 8 / elapsed)));
  } while (seconds_since(start) < seconds);
  return best;
}

double arithmetic_rate(int threads, double seconds, double (*loop)(int64_t)) {
  constexpr int64_t kSteps = 20000;
  return best_rate(threads, seconds, [&](int) { return loop(kSteps); });
}

// Each thread copies its own part; every page is touched beforehand.
double copy_rate(int threads, double seconds, int64_t bytes) {
  const size_t part = static_cast<size_t>(bytes / threads);
  std::unique_ptr<char[]> source(new char[static_cast<size_t>(bytes)]);
  std::unique_ptr<char[]> target(new char[static_cast<size_t>(bytes)]);
  std::memset(source.get(), 1, static_cast<size_t>(bytes));
  std::memset(target.get(), 2, static_cast<size_t>(bytes));
  return best_rate(threads, seconds, [&](int t) {
    const size_t first = part * static_cast<size_t>(t);
    std::memcpy(target.get() + first, source.get() + first, part);
    __asm__ volatile("" ::"r"(target.get()) : "memory");
    return 2.0 * static_cast<double>(part);
  });
}

}  // namespace

Status measure_peaks(int threads, int64_t copy_bytes, double seconds, MachinePeaks* peaks) {
  if (threads < 1 || threads > 1024) {
    return Status::invalid("threads: expected 1 to 1024, got " + std::to_string(threads));
  }
  if (copy_bytes < threads) {
    return Status::invalid("copy_bytes: expected at least one byte a thread, got " + std::to_string(copy_bytes));
  }
  if (!(seconds > 0 && seconds <= 60)) {
    return Status::invalid("seconds: expected more than 0 and at most 60, got " + std::to_string(seconds));
  }
  const PeakKernels* kernels = nullptr;
  const PeakKernels* binary = nullptr;
  Status status = choose_kernels(kChoices, &kernels);
  if (status.ok()) status = choose_kernels(kBinaryChoices, &binary);
  if (!status.ok()) return status;
  peaks->threads = threads;
  peaks->copy_bytes = copy_bytes;
  peaks->int8_gops = arithmetic_rate(threads, seconds, kernels->int8) / 1e9;
  peaks->binary_gops = arithmetic_rate(threads, seconds, binary->binary) / 1e9;
  peaks->float32_gflops = arithmetic_rate(threads, seconds, kernels->float32) / 1e9;
  peaks->copy_gbps = copy_rate(threads, seconds, copy_bytes) / 1e9;
  return status;
}

}  // namespace kdq
