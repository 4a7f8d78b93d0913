// Public functions of the binary family: validation, interleaving of the weights, blocking, threads.
#include "kdq/binary_gemm.h"

#include <algorithm>

#include "core/binary_call.h"
#include "core/checks.h"
#include "core/kernel_choice.h"
#include "core/parallel_range.h"
#include "core/scratch.h"

namespace kdq {
namespace {

constexpr KernelChoice<BinaryKernels> kChoices[] = {
    {Isa::kReference, CpuExtra::kNone, &kBinaryReference},
#if defined(KDQ_HAVE_X86)
    {Isa::kAvx2, CpuExtra::kNone, &kBinaryAvx2},
    {Isa::kAvx512, CpuExtra::kNone, &kBinaryAvx512},
    {Isa::kAvx512Vnni, CpuExtra::kVpopcntdq, &kBinaryAvx512Vpopcntdq},
#endif
};

void pack_rows(const BinaryKernels& kernels, DType dtype, const void* x, int64_t rows, int64_t k, uint64_t* bits,
               const ParallelFor& parallel_for) {
  constexpr int64_t kElementsWorthAThread = 1 << 15;
  const auto pack_row = kernels.pack_row[static_cast<int>(dtype)];
  const size_t row_bytes = static_cast<size_t>(k) * dtype_size(dtype);
  parallel_range(parallel_for, rows, kElementsWorthAThread / (k + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      pack_row(static_cast<const char*>(x) + static_cast<size_t>(r) * row_bytes, k, bits + r * binary_words(k));
    }
  });
}

// The rows of a product: their signs, or the values whose signs are packed on the way.
struct Rows {
  const uint64_t* bits;  // or nullptr
  DType dtype;
  const void* x;
  int64_t k;

  const char* row(int64_t r) const {
    return static_cast<const char*>(x) + static_cast<size_t>(r * k) * dtype_size(dtype);
  }
};

Status check_rows(const Rows& rows, int64_t m) {
  if (rows.bits != nullptr) return check_bits("x_bits", rows.bits, m, rows.k);
  if (m * rows.k > 0 && rows.x == nullptr) return Status::invalid("x: expected a pointer, got null");
  return {};
}

Status run_on_few_values(const BinaryCall& call, const Rows& rows, const ParallelFor& parallel_for) {
  Scratch scratch(static_cast<size_t>(call.m * call.words) * sizeof(uint64_t));
  if (scratch.data() == nullptr) return Status::internal("out of memory for the signs of x");
  uint64_t* bits = reinterpret_cast<uint64_t*>(scratch.data());
  pack_rows(*call.kernels, rows.dtype, rows.x, call.m, rows.k, bits, parallel_for);
  run_direct(call, bits, parallel_for);
  return {};
}

Status run(const BinaryCall& call, const Rows& rows, const ParallelFor& parallel_for) {
  const BinaryKernels& kernels = *call.kernels;
  const bool few = call.m <= kernels.size.direct_rows;
  if (few && rows.bits == nullptr) return run_on_few_values(call, rows, parallel_for);
  if (few) {
    run_direct(call, rows.bits, parallel_for);
    return {};
  }
  if (rows.bits != nullptr) {
    return run_binary_tiles(call, {}, parallel_for, [&](int64_t row, int count, const PreparedRows& to) {
      for (int r = 0; r < count; ++r) {
        kernels.spread(rows.bits + (row + r) * call.words, call.words, to.rows + r * to.stride);
      }
    });
  }
  const auto pack_row = kernels.pack_row[static_cast<int>(rows.dtype)];
  const BinaryInput input = {rows.row(0), rows.k * static_cast<int64_t>(dtype_size(rows.dtype))};
  return run_binary_tiles(call, input, parallel_for, [&](int64_t row, int count, const PreparedRows& to) {
    for (int r = 0; r < count; ++r) {
      char* steps = to.rows + r * to.stride;
      pack_row(rows.row(row + r), rows.k, call.bits_of(steps));
      kernels.spread(call.bits_of(steps), call.words, steps);
    }
  });
}

}  // namespace

Status binary_kernels(const BinaryKernels** kernels) { return choose_kernels(kChoices, kernels); }

void run_direct(const BinaryCall& call, const uint64_t* a, const ParallelFor& parallel_for) {
  constexpr int64_t kChannels = kDirectChannels;
  constexpr int64_t kWord = sizeof(uint64_t);
  const PlanePasses passes(call.row_planes(), call.weight_planes(), call.words * kWord, call.n * call.words * kWord);
  const int64_t groups = (call.n + kChannels - 1) / kChannels;
  const int64_t grain = kWordsWorthAThread / (kChannels * (passes.count * call.words + 1)) + 1;
  parallel_range(parallel_for, call.m * groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % call.m;  // all rows take some weights before the next ones are read
      const int64_t channel = i / call.m * kChannels;
      BinaryDirectCall direct = {a + row * call.row_planes() * call.words,
                                 call.weight_bits + channel * call.words,
                                 call.words,
                                 call.epilogue_at(channel),
                                 call.output_at(row, 1, channel, kChannels),
                                 &passes,
                                 nullptr};
      PlaneEpilogue planes;
      if (call.planes != nullptr) {
        planes = call.planes->epilogue_at(channel);
        planes.row_term += row;
        planes.row_scale += row;
        direct.planes = &planes;
      }
      call.kernels->direct(direct);
    }
  });
}

Status pack_signs(DType dtype, const void* x, int64_t rows, int64_t k, uint64_t* bits,
                  const ParallelFor& parallel_for) {
  const BinaryKernels* kernels = nullptr;
  Status status = binary_kernels(&kernels);
  if (status.ok()) status = check_binary_sizes(rows, 0, k);
  if (!status.ok()) return status;
  if (rows * k > 0 && (x == nullptr || bits == nullptr)) return Status::invalid("x, bits: expected pointers, got null");
  pack_rows(*kernels, dtype, x, rows, k, bits, parallel_for);
  return status;
}

Status unpack_signs(const uint64_t* bits, int64_t rows, int64_t k, float* x, const ParallelFor& parallel_for) {
  Status status = check_binary_sizes(rows, 0, k);
  if (status.ok()) status = check_bits("bits", bits, rows, k);
  if (!status.ok()) return status;
  if (rows * k > 0 && x == nullptr) return Status::invalid("x: expected a pointer, got null");
  parallel_range(parallel_for, rows, (1 << 15) / (k + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint64_t* row = bits + r * binary_words(k);
      for (int64_t i = 0; i < k; ++i) x[r * k + i] = (row[i / 64] >> (i % 64) & 1U) != 0 ? -1.0F : 1.0F;
    }
  });
  return status;
}

Status binary_matmul(const uint64_t* a_bits, const uint64_t* b_bits, int64_t m, int64_t n, int64_t k, int32_t* out,
                     const ParallelFor& parallel_for) {
  const BinaryKernels* kernels = nullptr;
  Status status = binary_kernels(&kernels);
  if (status.ok()) status = check_binary_sizes(m, n, k);
  if (status.ok()) status = check_bits("a_bits", a_bits, m, k);
  if (status.ok()) status = check_bits("b_bits", b_bits, n, k);
  if (!status.ok()) return status;
  if (m * n > 0 && out == nullptr) return Status::invalid("out: expected a pointer, got null");
  const BinaryEpilogue epilogue = {static_cast<int32_t>(k), nullptr, nullptr, nullptr};
  const BinaryCall call = {kernels, b_bits, m, n, binary_words(k), epilogue, Result::kInt32, out};
  return run(call, {a_bits, DType::kFloat32, nullptr, k}, parallel_for);
}

Status binary_linear(const BinaryLinear& args, const ParallelFor& parallel_for) {
  const BinaryKernels* kernels = nullptr;
  const Rows rows = {args.x_bits, args.dtype, args.x, args.k};
  Status status = binary_kernels(&kernels);
  if (status.ok()) status = check_binary_sizes(args.m, args.n, args.k);
  if (status.ok()) status = check_bits("weight_bits", args.weight_bits, args.n, args.k);
  if (status.ok()) status = check_rows(rows, args.m);
  if (!status.ok()) return status;
  if (args.m * args.n > 0 && args.y == nullptr) return Status::invalid("y: expected a pointer, got null");
  if (args.n > 0 && args.weight_scale == nullptr) return Status::invalid("weight_scale: expected a pointer, got null");
  status = check_binary_scale(args.weight_scale, args.n);
  if (!status.ok()) return status;
  const BinaryEpilogue epilogue = {static_cast<int32_t>(args.k), args.weight_scale, args.bias, nullptr};
  const BinaryCall call = {
      kernels, args.weight_bits, args.m, args.n, binary_words(args.k), epilogue, static_cast<Result>(args.dtype),
      args.y};
  return run(call, rows, parallel_for);
}

Status binary_threshold(const BinaryThreshold& args, const ParallelFor& parallel_for) {
  const BinaryKernels* kernels = nullptr;
  const Rows rows = {args.x_bits, args.dtype, args.x, args.k};
  Status status = binary_kernels(&kernels);
  if (status.ok()) status = check_binary_sizes(args.m, args.n, args.k);
  if (status.ok()) status = check_bits("weight_bits", args.weight_bits, args.n, args.k);
  if (status.ok()) status = check_rows(rows, args.m);
  if (!status.ok()) return status;
  if (args.m * args.n > 0 && args.y_bits == nullptr) return Status::invalid("y_bits: expected a pointer, got null");
  if (args.n > 0 && args.threshold == nullptr) return Status::invalid("threshold: expected a pointer, got null");
  const BinaryEpilogue epilogue = {static_cast<int32_t>(args.k), nullptr, nullptr, args.threshold};
  const BinaryCall call = {kernels,  args.weight_bits, args.m,     args.n, binary_words(args.k),
                           epilogue, Result::kBits,    args.y_bits};
  return run(call, rows, parallel_for);
}

}  // namespace kdq
