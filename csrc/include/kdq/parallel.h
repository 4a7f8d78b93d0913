// ParallelFor: the callback through which kernels use threads, so that the caller decides whose threads they are.
//
// The torch binding passes torch's pool; the C++ and NumPy faces use default_executor(). Results do not depend on the
// number of threads, bit for bit: work is cut into pieces whose size depends on the shape alone.
#pragma once

#include <cstdint>

#include "kdq/status.h"

namespace kdq {

struct ParallelFor {
  // One piece of the work: process items [begin, end).
  using Body = void (*)(void* arg, int64_t begin, int64_t end);

  // Calls body over disjoint ranges that cover [0, n), none shorter than grain but the last, and returns when all are
  // done. May be called from any thread. body does not throw.
  void (*run)(void* context, int64_t n, int64_t grain, Body body, void* arg);
  void* context;
};

// Runs everything on the calling thread.
KDQ_API const ParallelFor& serial_executor();

// The library's own pool; starts its threads at first use. The calling thread works too.
KDQ_API const ParallelFor& default_executor();

// How many threads default_executor() uses; at first all CPUs this process may run on.
KDQ_API int num_threads();
KDQ_API Status set_num_threads(int n);

}  // namespace kdq
