// parallel_range(): lets core code hand a lambda to a ParallelFor.
#pragma once

#include <type_traits>

#include "kdq/parallel.h"

namespace kdq {

// body(begin, end) over disjoint ranges covering [0, n), each at least grain items but the last.
template <class Body>
void parallel_range(const ParallelFor& parallel_for, int64_t n, int64_t grain, Body&& body) {
  if (n <= 0) return;
  if (n <= grain) {
    body(int64_t{0}, n);
    return;
  }
  using Plain = std::remove_reference_t<Body>;
  parallel_for.run(
      parallel_for.context, n, grain,
      [](void* arg, int64_t begin, int64_t end) { (*static_cast<Plain*>(arg))(begin, end); }, &body);
}

}  // namespace kdq
