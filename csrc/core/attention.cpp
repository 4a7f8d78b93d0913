// Attention: checks, and who computes which queries.
#include "kdq/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <type_traits>

#include "core/attention_kernels.h"
#include "core/checks.h"
#include "core/kernel_choice.h"
#include "core/parallel_range.h"
#include "core/scratch.h"

namespace kdq {
namespace {

constexpr KernelChoice<AttentionKernels> kChoices[] = {
    {Isa::kReference, CpuExtra::kNone, &kAttentionReference},
#if defined(KDQ_HAVE_X86)
    {Isa::kAvx2, CpuExtra::kNone, &kAttentionAvx2},
    {Isa::kAvx512, CpuExtra::kNone, &kAttentionAvx512},
#endif
};

// Queries that threads are given at once: whole groups of a tile's rows on every ISA. Fewer where they stand for heads,
// of which there may be no others for further threads.
constexpr int64_t kPiece = 48;
constexpr int64_t kPieceOfHeads = 6;
// Multiplications and additions below which waking another thread costs more than it saves (some 7 us).
constexpr double kWorkWorthAThread = 2e6;
// Fewer queries take as long as so many: reading keys and values is what takes the time.
constexpr int64_t kQueriesOfReading = 6;

// Times log2(e) it is still finite.
constexpr float kLargestScale = 1e38F;

Status check_attention(const Attention& a) {
  if (a.batch < 0 || a.heads < 0 || a.queries < 0 || a.keys < 0 || a.head_size < 1 || a.value_size < 1) {
    return Status::invalid(
        "query, key, value: expected sizes of at least 0, and at least 1 of a head and its values, got " +
        std::to_string(a.batch) + " x " + std::to_string(a.heads) + " heads, " + std::to_string(a.queries) +
        " queries of " + std::to_string(a.head_size) + ", " + std::to_string(a.keys) + " values of " +
        std::to_string(a.value_size));
  }
  if (a.heads > 0 && (a.kv_heads < 1 || a.heads % a.kv_heads != 0)) {
    return Status::invalid("key: expected a number of heads that divides the " + std::to_string(a.heads) +
                           " of query, got " + std::to_string(a.kv_heads));
  }
  if (!(std::fabs(a.scale) <= kLargestScale)) {
    return Status::invalid("scale: expected a number of at most 1e38, got " + format(a.scale));
  }
  const int64_t results = a.batch * a.heads * a.queries;
  Status status = check_pointer("query", a.q, results);
  if (status.ok()) status = check_pointer("key", a.k, results * a.keys);
  if (status.ok()) status = check_pointer("value", a.v, results * a.keys);
  if (status.ok()) status = check_pointer("y", a.y, results);
  if (status.ok() && a.mask_kind != MaskKind::kNone) status = check_pointer("attn_mask", a.mask, results * a.keys);
  return status;
}

template <class T>
T* moved(T* base, const AttentionStrides& strides, int64_t batch, int64_t head, size_t element_bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  if (base == nullptr) return nullptr;
  const int64_t elements = batch * strides.batch + head * strides.head;
  return static_cast<Byte*>(base) + elements * static_cast<int64_t>(element_bytes);
}

// With one query a head, the query heads that share a key head are as well its queries: each block of keys then comes
// from memory once for all of them.
Attention with_groups_as_queries(Attention a) {
  const int64_t group = a.heads / a.kv_heads;
  if (a.queries != 1 || a.causal || group == 1) return a;
  for (AttentionStrides* strides : {&a.q_strides, &a.y_strides, &a.mask_strides}) {
    strides->row = strides->head;
    strides->head *= group;
  }
  a.heads = a.kv_heads;
  a.queries = group;
  return a;
}

HeadQueries at_head(const Attention& a, int64_t index) {
  const int64_t batch = index / a.heads;
  const int64_t head = index % a.heads;
  const int64_t kv_head = head / (a.heads / a.kv_heads);
  const size_t bytes = dtype_size(a.dtype);
  const size_t mask_bytes = a.mask_kind == MaskKind::kFloat32 ? sizeof(float) : 1;
  HeadQueries job = {};
  job.args = &a;
  job.q = moved(a.q, a.q_strides, batch, head, bytes);
  job.k = moved(a.k, a.k_strides, batch, kv_head, bytes);
  job.v = moved(a.v, a.v_strides, batch, kv_head, bytes);
  job.mask = moved(a.mask, a.mask_strides, batch, head, mask_bytes);
  job.y = moved(a.y, a.y_strides, batch, head, bytes);
  return job;
}

}  // namespace

Status scaled_dot_product_attention(const Attention& given, const ParallelFor& parallel_for) {
  const AttentionKernels* kernels = nullptr;
  Status status = choose_kernels(kChoices, &kernels);
  if (status.ok()) status = check_attention(given);
  if (!status.ok() || given.batch * given.heads * given.queries == 0) return status;
  const Attention args = with_groups_as_queries(given);
  const auto run = kernels->run[static_cast<int>(args.dtype)];
  const size_t scratch_bytes = static_cast<size_t>(kernels->scratch_floats(args)) * sizeof(float);
  const int64_t piece = args.heads == given.heads ? kPiece : kPieceOfHeads;
  const int64_t pieces = (args.queries + piece - 1) / piece;  // of a head
  const double piece_work = 2.0 *
                            static_cast<double>(std::clamp(args.queries, kQueriesOfReading, piece) * (args.keys + 1)) *
                            static_cast<double>(args.head_size + args.value_size);
  const int64_t grain = static_cast<int64_t>(kWorkWorthAThread / piece_work) + 1;
  std::atomic<bool> out_of_memory{false};
  parallel_range(parallel_for, args.batch * args.heads * pieces, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_bytes);
    if (scratch.data() == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t i = begin; i < end;) {
      HeadQueries job = at_head(args, i / pieces);
      const int64_t last = std::min({i - i % pieces + pieces, end, i + kMostQueries / piece});  // of the same head
      job.first = i % pieces * piece;
      job.count = std::min(args.queries - job.first, (last - i) * piece);
      run(job, reinterpret_cast<float*>(scratch.data()));
      i = last;
    }
  });
  if (out_of_memory) return Status::internal("out of memory for a block of keys");
  return status;
}

}  // namespace kdq
