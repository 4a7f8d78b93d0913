// Public functions of the codebook family: packing of indices, validation, blocking, threads.
#include "kdq/codebook.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>

#include "core/checks.h"
#include "core/codebook_kernels.h"
#include "core/format.h"
#include "core/kernel_choice.h"
#include "core/parallel_range.h"
#include "core/product.h"

namespace kdq {
namespace {

constexpr KernelChoice<CodebookKernels> kChoices[] = {
    {Isa::kReference, CpuExtra::kNone, &kCodebookReference},
#if defined(KDQ_HAVE_X86)
    {Isa::kAvx2, CpuExtra::kNone, &kCodebookAvx2},
    {Isa::kAvx512, CpuExtra::kNone, &kCodebookAvx512},
#endif
};

// Multiply-accumulates that each thread must find to do: some 5 us of work.
constexpr int64_t kProductsWorthAThread = 1 << 17;
constexpr int64_t kIndicesWorthAThread = 1 << 15;

Status check_codebook(const float* codebook, int bits) {
  if (codebook == nullptr) return Status::invalid("codebook: expected a pointer, got null");
  for (int i = 0; i < 1 << bits; ++i) {
    if (std::isfinite(codebook[i])) continue;
    return Status::invalid("codebook: expected finite numbers, got " + format(codebook[i]) + " at index " +
                           std::to_string(i));
  }
  return {};
}

// The first index of a row that is not below 2^bits; k if all are.
int64_t first_too_large(const uint8_t* row, int64_t k, int bits) {
  uint8_t all = 0;  // without a branch, so that compilers vectorise it
  for (int64_t i = 0; i < k; ++i) all |= row[i];
  if (all >> bits == 0) return k;
  return std::find_if(row, row + k, [bits](uint8_t index) { return index >> bits != 0; }) - row;
}

void pack_panel(const uint8_t* indices, int64_t channels, int64_t k, int bits, uint32_t* panel) {
  const int64_t per_word = 32 / bits;
  std::fill_n(panel, codebook_words(k, bits) * kCodebookLanes, 0U);
  for (int64_t lane = 0; lane < channels; ++lane) {
    for (int64_t i = 0; i < k; ++i) {
      panel[i / per_word * kCodebookLanes + lane] |= static_cast<uint32_t>(indices[lane * k + i])
                                                     << (i % per_word * bits);
    }
  }
}

// What is the same in every tile of a call.
struct Call {
  const CodebookLinear& args;
  const CodebookKernels& kernels;
  int64_t steps;
  Place place;
  float table[kCodebookTable];

  // Of `count` panels from the given one on; set_rows() adds what belongs to the rows.
  CodebookTileCall tile(int64_t panel, int count) const {
    const int64_t channel = panel * kCodebookLanes;
    const int64_t stride = steps * kCodebookLanes;
    CodebookTileCall call;
    call.panels = {args.packed + panel * stride, stride, count};
    call.steps = steps;
    call.bits = args.bits;
    call.table = table;
    call.bias = args.bias == nullptr ? nullptr : args.bias + channel;
    call.activation = args.activation;
    call.out.type = static_cast<Result>(args.dtype);
    call.out.element_bytes = result_bytes(call.out.type);
    call.out.place = place;
    call.out.cols = static_cast<int>(std::min<int64_t>(count * kCodebookLanes, args.n - channel));
    call.out.y_stride = args.n;
    return call;
  }

  void set_rows(const RowTile& rows, int64_t panel, CodebookTileCall* call) const {
    call->rows = reinterpret_cast<const float*>(rows.rows);
    call->row_stride = rows.stride / static_cast<int64_t>(sizeof(float));
    call->out.rows = rows.count;
    call->out.y = static_cast<char*>(args.y) + (rows.first * args.n + panel * kCodebookLanes) * call->out.element_bytes;
  }
};

}  // namespace

Status pack_indices(const uint8_t* indices, int64_t n, int64_t k, int bits, uint32_t* packed,
                    const ParallelFor& parallel_for) {
  Status status = check_codebook_sizes(0, n, k, bits);
  if (!status.ok() || n * k == 0) return status;
  if (indices == nullptr || packed == nullptr) return Status::invalid("indices, packed: expected pointers, got null");
  std::atomic<int64_t> wrong{-1};
  parallel_range(parallel_for, codebook_panels(n), kIndicesWorthAThread / (16 * k) + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t p = begin; p < end; ++p) {
                     const int64_t first = p * kCodebookLanes;
                     const int64_t channels = std::min(kCodebookLanes, n - first);
                     const int64_t at = first_too_large(indices + first * k, channels * k, bits);
                     if (at < channels * k) wrong.store(first * k + at, std::memory_order_relaxed);
                     const int64_t panel_words = codebook_words(k, bits) * kCodebookLanes;
                     pack_panel(indices + first * k, channels, k, bits, packed + p * panel_words);
                   }
                 });
  const int64_t at = wrong.load(std::memory_order_relaxed);
  if (at < 0) return status;
  return Status::invalid("indices: expected below " + std::to_string(1 << bits) + " for " + std::to_string(bits) +
                         " bits, got " + std::to_string(indices[at]) + " in row " + std::to_string(at / k));
}

Status unpack_indices(const uint32_t* packed, int64_t n, int64_t k, int bits, uint8_t* indices,
                      const ParallelFor& parallel_for) {
  Status status = check_codebook_sizes(0, n, k, bits);
  if (!status.ok() || n * k == 0) return status;
  if (indices == nullptr || packed == nullptr) return Status::invalid("indices, packed: expected pointers, got null");
  const int64_t per_word = 32 / bits;
  parallel_range(parallel_for, n, kIndicesWorthAThread / k + 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const uint32_t* lane =
          packed + c / kCodebookLanes * codebook_words(k, bits) * kCodebookLanes + c % kCodebookLanes;
      for (int64_t i = 0; i < k; ++i) {
        const uint32_t word = lane[i / per_word * kCodebookLanes] >> (i % per_word * bits);
        indices[c * k + i] = static_cast<uint8_t>(word & ((1U << bits) - 1U));
      }
    }
  });
  return status;
}

Status codebook_linear(const CodebookLinear& args, const ParallelFor& parallel_for) {
  const CodebookKernels* kernels = nullptr;
  Status status = choose_kernels(kChoices, &kernels);
  if (status.ok()) status = check_codebook_sizes(args.m, args.n, args.k, args.bits);
  if (status.ok()) status = check_codebook(args.codebook, args.bits);
  if (!status.ok()) return status;
  if (args.m * args.k > 0 && args.x == nullptr) return Status::invalid("x: expected a pointer, got null");
  if (args.m * args.n > 0 && args.y == nullptr) return Status::invalid("y: expected a pointer, got null");
  if (args.n * args.k > 0 && args.packed == nullptr) return Status::invalid("packed: expected a pointer, got null");

  Call call = {args, *kernels, codebook_words(args.k, args.bits), Place::kNear, {}};
  const int element = result_bytes(static_cast<Result>(args.dtype));
  call.place = place_of(args.y, args.m, args.n * element);
  for (int i = 0; i < kCodebookTable; ++i) call.table[i] = args.codebook[i & ((1 << args.bits) - 1)];

  const int64_t padded = call.steps * (32 / args.bits);
  const int64_t panels = codebook_panels(args.n);
  const int at_once = kernels->panels_at_once(static_cast<int>(std::clamp<int64_t>(args.m, 1, kernels->mr)));
  const bool is_shared = args.m * args.n * args.k >= 2 * kProductsWorthAThread;
  ProductShape shape;
  shape.m = args.m;
  shape.row_bytes = padded * static_cast<int64_t>(sizeof(float));
  shape.mr = kernels->mr;
  shape.groups = (panels + at_once - 1) / at_once;
  shape.row_work = at_once * kCodebookLanes * args.k;
  shape.grain = is_shared ? kProductsWorthAThread : std::numeric_limits<int64_t>::max() - 1;
  const auto widen = kernels->widen[static_cast<int>(args.dtype)];
  const size_t x_row_bytes = static_cast<size_t>(args.k) * dtype_size(args.dtype);
  return run_product(
      shape, parallel_for,
      [&](int64_t first, int count, const PreparedRows& to) {
        for (int r = 0; r < count; ++r) {
          widen(static_cast<const char*>(args.x) + static_cast<size_t>(first + r) * x_row_bytes, args.k, padded,
                reinterpret_cast<float*>(to.rows + r * to.stride));
        }
      },
      [&](int64_t group) {
        const int64_t panel = group * at_once;
        const int count = static_cast<int>(std::min<int64_t>(at_once, panels - panel));
        return [&, panel, tile = call.tile(panel, count)](const RowTile& rows) mutable {
          call.set_rows(rows, panel, &tile);
          kernels->tile(tile);
        };
      });
}

}  // namespace kdq
