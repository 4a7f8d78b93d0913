// What an ISA provides for attention: some queries of one head, by one thread.
#pragma once

#include <cstdint>

#include "core/elements.h"
#include "kdq/attention.h"

namespace kdq {

// Queries first ... first + count - 1 of one head; pointers are to that head's first element.
struct HeadQueries {
  const Attention* args;
  const void* q;
  const void* k;
  const void* v;
  const void* mask;
  void* y;
  int64_t first;
  int64_t count;
};

// Keys whose scores are made before they are turned into weights. A block of a head of 64, transposed, and its values
// are 64 KiB each, which stay in L2 while all queries pass over them. Part of the result: it says when sums are
// rescaled.
constexpr int64_t kKeyBlock = 256;

// Queries that one call takes: what is made of a block of keys serves them all. Of a head of 64 their sums are 144 KiB.
constexpr int64_t kMostQueries = 576;

struct AttentionKernels {
  int64_t (*scratch_floats)(const Attention& args);
  void (*run[3])(const HeadQueries& job, float* scratch);  // by DType
};

template <class L>
constexpr AttentionKernels make_attention_kernels() {
  return {L::scratch_floats, {L::template run<float>, L::template run<BFloat16>, L::template run<Float16>}};
}

extern const AttentionKernels kAttentionReference;
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;

}  // namespace kdq
