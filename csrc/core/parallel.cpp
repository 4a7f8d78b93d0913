// The executors behind ParallelFor: serial, and the library's own thread pool.
//
// The pool hands out pieces of [0, n) from one atomic counter; the calling thread takes part, so a pool of size 1
// starts no thread. One job runs at a time: a call that finds the pool busy (a second user thread, or a kernel called
// from within a piece) runs its own work serially instead of waiting. Workers do not survive fork(), so the child of a
// fork starts a pool of its own.
//
// Waking a thread that sleeps takes some 40 us. So whoever waits, workers for the next job and a caller for the end of
// its own, looks for it in a loop first, for as long as that: calls that follow one another find the threads awake.
#include "kdq/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace kdq {
namespace {

int usable_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1U, std::thread::hardware_concurrency());
}

constexpr std::chrono::microseconds kLookingFor{50};

// True as soon as done() is; false after some time.
template <class Done>
bool look_for(Done done) {
  const auto end = std::chrono::steady_clock::now() + kLookingFor;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    std::this_thread::yield();  // who is waited for may be on the same CPU
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

std::atomic<int>& thread_count() {
  static std::atomic<int> count{usable_cpus()};
  return count;
}

struct Job {
  int64_t n = 0;
  int64_t piece = 1;
  ParallelFor::Body body = nullptr;
  void* arg = nullptr;
  std::atomic<int64_t> next{0};

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= n) return;
      body(arg, begin, std::min(n, begin + piece));
    }
  }
};

class Pool {
 public:
  // True if the job was run; false if the pool is busy.
  bool try_run(Job* job, int threads) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    start_workers(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      wanted_ = std::min(threads - 1, workers_);
      running_ = wanted_.load();
      ++generation_;
    }
    wake_.notify_all();
    job->work();
    if (may_look()) look_for([this] { return running_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  // Where the system refuses another thread, the pool goes on with those it has: results do not depend on their number.
  void start_workers(int count) {
    try {
      while (workers_ < count) {
        std::thread worker([this, index = workers_, seen = generation_.load()] { serve(index, seen); });
        worker.detach();  // lives until the process ends; the pool is never destroyed
        ++workers_;
      }
    } catch (const std::system_error&) {
    }
  }

  // More threads than CPUs would keep each other from working.
  bool may_look() const { return wanted_ < cpus_; }

  void serve(int index, uint64_t seen) {
    bool was_wanted = false;
    for (;;) {
      if (was_wanted && may_look()) look_for([&] { return generation_ != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      was_wanted = index < wanted_;
      if (!was_wanted) continue;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;  // held by the thread whose job is running
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_;
  std::condition_variable done_;
  const int cpus_ = usable_cpus();
  int workers_ = 0;  // started so far; touched by the owner only
  Job* job_ = nullptr;
  std::atomic<int> wanted_{0};
  std::atomic<int> running_{0};
  std::atomic<uint64_t> generation_{0};
};

Pool* g_pool = nullptr;

// The pool is leaked on purpose: its threads may still wait on it while static destructors run.
Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
  });
  return *g_pool;
}

void run_serial(void*, int64_t n, int64_t, ParallelFor::Body body, void* arg) {
  if (n > 0) body(arg, 0, n);
}

void run_pooled(void*, int64_t n, int64_t grain, ParallelFor::Body body, void* arg) {
  if (n <= 0) return;
  const int threads = num_threads();
  grain = std::max<int64_t>(1, grain);
  if (threads > 1 && n > grain) {
    Job job;
    job.n = n;
    // One piece a thread, as torch does: products prepare what they need once a piece.
    job.piece = std::max(grain, (n + threads - 1) / threads);
    job.body = body;
    job.arg = arg;
    if (pool().try_run(&job, threads)) return;
  }
  body(arg, 0, n);
}

constexpr ParallelFor kSerial{run_serial, nullptr};
constexpr ParallelFor kPooled{run_pooled, nullptr};

}  // namespace

const ParallelFor& serial_executor() { return kSerial; }
const ParallelFor& default_executor() { return kPooled; }

int num_threads() { return thread_count().load(std::memory_order_relaxed); }

Status set_num_threads(int n) {
  if (n < 1) return Status::invalid("num_threads: expected at least 1, got " + std::to_string(n));
  thread_count().store(n, std::memory_order_relaxed);
  return {};
}

}  // namespace kdq
