// Measures the machine's limits: runs the peak loops of the ISA in force, and of those below it, on all the threads at
// once, and keeps the best.
#include "kdq/peaks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <new>
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
    {Isa::kAvx2, CpuExtra::kNone, &kPeaksAvx2},
    {Isa::kAvx2, CpuExtra::kAvxVnni, &kPeaksAvxVnni},
    {Isa::kAvx512, CpuExtra::kNone, &kPeaksAvx512},
    {Isa::kAvx512Vnni, CpuExtra::kNone, &kPeaksAvx512Vnni},
    {Isa::kAvx512Vnni, CpuExtra::kVpopcntdq, &kPeaksAvx512Vpopcntdq},
    {Isa::kAvx512Vnni, CpuExtra::kBf16, &kPeaksAvx512Bf16},
#endif
};

using Clock = std::chrono::steady_clock;

// Does a piece of work once on that thread and returns its operations or bytes.
using Work = std::function<double(int thread)>;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// The tables whose loops may run. The reference counts where nothing else is allowed: it is never the best.
Status allowed_tables(std::vector<const PeakKernels*>* tables) {
  Isa isa = Isa::kReference;
  Status status = current_isa(&isa);
  if (!status.ok()) return status;
  for (const KernelChoice<PeakKernels>& choice : kChoices) {
    const bool wanted = choice.isa != Isa::kReference || isa == Isa::kReference;
    if (wanted && choice.isa <= isa && cpu_has(choice.extra)) tables->push_back(choice.table);
  }
  return status;
}

// Runs work(thread) on `threads` threads that start together and returns the wall time from the start to the last end.
double time_together(int threads, const std::function<void(int)>& work) {
  std::atomic<int> waiting{0};
  std::atomic<bool> started{false};
  std::vector<std::thread> workers;
  for (int t = 1; t < threads; ++t) {
    workers.emplace_back([&, t] {
      ++waiting;
      while (!started.load(std::memory_order_acquire)) std::this_thread::yield();
      work(t);
    });
  }
  while (waiting.load() < threads - 1) std::this_thread::yield();
  const Clock::time_point start = Clock::now();
  started.store(true, std::memory_order_release);
  work(0);
  for (std::thread& worker : workers) worker.join();
  return seconds_since(start);
}

// Units a second in the best of the rounds that fit in the time.
double best_round(int threads, double seconds, const Work& once) {
  std::vector<double> units(static_cast<size_t>(threads));
  int64_t repeat = 1;
  double best = 0;
  const Clock::time_point start = Clock::now();
  do {
    const double elapsed = time_together(threads, [&](int t) {
      double sum = 0;
      for (int64_t i = 0; i < repeat; ++i) sum += once(t);
      units[static_cast<size_t>(t)] = sum;
    });
    double total = 0;
    for (double u : units) total += u;
    best = std::max(best, total / elapsed);
    // Rounds of an eighth of the time: long against the end of threads, short enough that one is undisturbed.
    const double wanted = static_cast<double>(repeat) * seconds / 8 / elapsed;
    if (elapsed < seconds / 8) {
      repeat = std::max(repeat + 1, static_cast<int64_t>(std::min(8.0 * static_cast<double>(repeat), wanted)));
    }
  } while (seconds_since(start) < seconds);
  return best;
}

// The best way's rate: half of the time goes to a trial of each, half to the winner.
double best_rate(int threads, double seconds, const std::vector<Work>& ways) {
  const double trial = seconds / 2 / static_cast<double>(ways.size());
  double best = 0;
  size_t winner = 0;
  for (size_t i = 0; i < ways.size(); ++i) {
    const double rate = best_round(threads, trial, ways[i]);
    if (rate > best) {
      best = rate;
      winner = i;
    }
  }
  return std::max(best, best_round(threads, seconds / 2, ways[winner]));
}

std::vector<Work> arithmetic(const std::vector<const PeakKernels*>& tables,
                             std::initializer_list<PeakLoop PeakKernels::*> members) {
  constexpr int64_t kSteps = 5000;
  std::vector<Work> ways;
  for (const PeakKernels* table : tables) {
    for (PeakLoop PeakKernels::* member : members) {
      if (PeakLoop loop = table->*member) ways.emplace_back([loop](int) { return loop(kSteps); });
    }
  }
  return ways;
}

// Memory in which every page has been touched, aligned as tensors are.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kAlignment))) {
    std::memset(data_, 1, static_cast<size_t>(bytes));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, kAlignment); }
  char* at(int64_t offset) const { return data_ + offset; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  char* data_;
};

void copy_by_memcpy(char* target, const char* source, int64_t bytes) {
  std::memcpy(target, source, static_cast<size_t>(bytes));
  __asm__ volatile("" ::"r"(target) : "memory");
}

// Each thread copies its own part.
double copy_rate(const std::vector<const PeakKernels*>& tables, int threads, int64_t part, double seconds) {
  const Buffer source(part * threads);
  const Buffer target(part * threads);
  std::vector<PeakCopy> copies = {copy_by_memcpy};
  for (const PeakKernels* table : tables) {
    for (PeakCopy copy : table->copies) {
      if (copy != nullptr) copies.push_back(copy);
    }
  }
  std::vector<Work> ways;
  for (PeakCopy copy : copies) {
    ways.emplace_back([&, copy](int t) {
      copy(target.at(part * t), source.at(part * t), part);
      return 2.0 * static_cast<double>(part);
    });
  }
  return best_rate(threads, seconds, ways);
}

// Each thread reads its own part.
double read_rate(const std::vector<const PeakKernels*>& tables, int threads, int64_t part, double seconds) {
  const Buffer source(part * threads);
  std::vector<Work> ways;
  for (const PeakKernels* table : tables) {
    for (PeakRead read : table->reads) {
      if (read == nullptr) continue;
      ways.emplace_back([&, read](int t) {
        read(source.at(part * t), part);
        return static_cast<double>(part);
      });
    }
  }
  return best_rate(threads, seconds, ways);
}

Status check_arguments(Peak peak, int threads, int64_t part, double seconds) {
  if (threads < 1 || threads > 1024) {
    return Status::invalid("threads: expected 1 to 1024, got " + std::to_string(threads));
  }
  if (!(seconds > 0 && seconds <= 60)) {
    return Status::invalid("seconds: expected more than 0 and at most 60, got " + std::to_string(seconds));
  }
  if ((peak == Peak::kCopy || peak == Peak::kRead) && part < kPeakGrain) {
    return Status::invalid("bytes: expected at least " + std::to_string(kPeakGrain) + " a thread");
  }
  return {};
}

}  // namespace

Status measure_peak(Peak peak, int threads, int64_t bytes, double seconds, double* rate) {
  const int64_t part = threads < 1 ? 0 : bytes / threads / kPeakGrain * kPeakGrain;
  Status status = check_arguments(peak, threads, part, seconds);
  std::vector<const PeakKernels*> tables;
  if (status.ok()) status = allowed_tables(&tables);
  if (!status.ok()) return status;
  switch (peak) {
    case Peak::kInt8:
      *rate = best_rate(threads, seconds, arithmetic(tables, {&PeakKernels::int8}));
      break;
    case Peak::kBinary:
      *rate = best_rate(threads, seconds, arithmetic(tables, {&PeakKernels::binary}));
      break;
    case Peak::kFloat32:
      *rate = best_rate(threads, seconds, arithmetic(tables, {&PeakKernels::float32}));
      break;
    case Peak::kBFloat16:
      *rate = best_rate(threads, seconds, arithmetic(tables, {&PeakKernels::bfloat16, &PeakKernels::float32}));
      break;
    case Peak::kCopy:
      *rate = copy_rate(tables, threads, part, seconds);
      break;
    case Peak::kRead:
      *rate = read_rate(tables, threads, part, seconds);
      break;
  }
  return status;
}

}  // namespace kdq
