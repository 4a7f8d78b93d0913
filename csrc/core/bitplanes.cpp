// Public functions of bit planes: packing, validation, and products on the binary family's kernels and blocking.
#include "kdq/bitplanes.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/binary_call.h"
#include "core/int8_call.h"
#include "core/parallel_range.h"
#include "core/plane_forms.h"

namespace kdq {
namespace {

constexpr int64_t kElementsWorthAThread = 1 << 14;

int64_t row_grain(int64_t k) { return kElementsWorthAThread / (k + 1) + 1; }

// The lowest bits of eight bytes, side by side.
uint64_t gather_bits(uint64_t bytes) { return (bytes & 0x0101010101010101U) * 0x0102040810204080U >> 56; }
// And back.
uint64_t spread_bits(uint64_t bits) {
  const uint64_t own = (bits & 0xFFU) * 0x0101010101010101U & 0x8040201008040201U;  // byte i has bit i alone
  return (own + 0x7F7F7F7F7F7F7F7FU) >> 7 & 0x0101010101010101U;
}

// One row. Returns the first element that is no integer of the form, or k.
template <class T>
int64_t pack_row(const T* q, int64_t k, int bits, const PlaneCodes& codes, uint64_t* planes, int64_t stride) {
  for (int64_t first = 0; first < k; first += 64, ++planes) {
    uint8_t bytes[64] = {};
    const int64_t count = std::min<int64_t>(64, k - first);
    for (int64_t i = 0; i < count; ++i) {
      const int above = q[first + i] - codes.offset;
      const int code = above / codes.factor;
      if (code < 0 || code > codes.top || code * codes.factor != above) return first + i;
      bytes[i] = static_cast<uint8_t>(code);
    }
    for (int p = 0; p < bits; ++p) {
      uint64_t word = 0;
      for (int i = 0; i < 8; ++i) {
        uint64_t eight = 0;
        std::memcpy(&eight, bytes + 8 * i, sizeof(eight));
        word |= gather_bits(eight >> p) << (8 * i);
      }
      planes[p * stride] = word;
    }
  }
  return k;
}

template <class T>
void unpack_row(const uint64_t* planes, int64_t k, int bits, const PlaneCodes& codes, int64_t stride, T* q) {
  for (int64_t first = 0; first < k; first += 8) {
    uint64_t eight = 0;
    for (int p = 0; p < bits; ++p) {
      eight |= spread_bits(planes[p * stride + first / 64] >> (first % 64)) << p;
    }
    for (int64_t i = 0; i < std::min<int64_t>(8, k - first); ++i) {
      q[first + i] = static_cast<T>(codes.integer(static_cast<int>(eight >> (8 * i) & 0xFFU)));
    }
  }
}

std::string described(const PlaneCodes& codes) {
  const int ends[2] = {codes.integer(0), codes.integer(codes.top)};
  return (codes.factor == 1 ? "integers from " : "odd integers from ") + std::to_string(std::min(ends[0], ends[1])) +
         " to " + std::to_string(std::max(ends[0], ends[1]));
}

void note_smaller(std::atomic<int64_t>* least, int64_t value) {
  int64_t seen = least->load();
  while (value < seen && !least->compare_exchange_weak(seen, value)) continue;
}

template <class T>
Status pack_rows(const T* q, int64_t rows, int64_t k, int bits, const PlaneCodes& codes, uint64_t* planes,
                 const ParallelFor& parallel_for) {
  const int64_t words = binary_words(k);
  std::atomic<int64_t> wrong{rows * k};
  parallel_range(parallel_for, rows, row_grain(k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = pack_row(q + r * k, k, bits, codes, planes + r * words, rows * words);
      if (at < k) note_smaller(&wrong, r * k + at);
    }
  });
  const int64_t first = wrong.load();
  if (first == rows * k) return {};
  return Status::invalid("q: expected " + described(codes) + " for " + std::to_string(bits) + " bits, got " +
                         std::to_string(q[first]) + " at row " + std::to_string(first / k) + ", element " +
                         std::to_string(first % k));
}

Status check_matrix(const char* name, const PlaneMatrix& a, int64_t k) {
  Status status = check_plane_count(name, a.bits, a.form);
  return status.ok() ? check_bits(name, a.planes, a.bits * a.rows, k) : status;
}

// Of a row whose planes lie `stride` words apart.
int64_t sum_of(const uint64_t* planes, int64_t stride, int64_t words, int64_t k, int bits, const PlaneCodes& codes) {
  int64_t sum = 0;
  for (int p = 0; p < bits; ++p) {
    for (int64_t w = 0; w < words; ++w) {
      sum += static_cast<int64_t>(__builtin_popcountll(planes[p * stride + w])) << p;
    }
  }
  return codes.factor * sum + codes.offset * k;
}

// Few rows, against row-major weights. fill(row, planes, stride, scale): writes the planes of a row, `stride` words
// apart, and its scale; returns its term.
template <class Fill>
Status run_few(const BinaryCall& call, const ParallelFor& parallel_for, Fill&& fill) {
  const int64_t row_words = call.row_planes() * call.words;
  Scratch scratch(static_cast<size_t>(call.m) * (static_cast<size_t>(row_words) * sizeof(uint64_t) + 8));
  if (scratch.data() == nullptr) return Status::internal("out of memory for the planes of x");
  uint64_t* planes = reinterpret_cast<uint64_t*>(scratch.data());
  int32_t* terms = reinterpret_cast<int32_t*>(planes + call.m * row_words);
  float* scales = reinterpret_cast<float*>(terms + call.m);
  for (int64_t r = 0; r < call.m; ++r) terms[r] = fill(r, planes + r * row_words, call.words, scales + r);
  BinaryPlanes of_rows = *call.planes;
  of_rows.epilogue.row_term = terms;
  of_rows.epilogue.row_scale = scales;
  BinaryCall direct = call;
  direct.planes = &of_rows;
  run_direct(direct, planes, parallel_for);
  return {};
}

template <class Fill>
Status run(const BinaryCall& call, const BinaryInput& input, const ParallelFor& parallel_for, Fill&& fill) {
  if (call.m <= call.kernels->size.direct_rows) return run_few(call, parallel_for, fill);
  const int64_t plane_bytes = call.plane_bytes();
  return run_binary_tiles(call, input, parallel_for, [&](int64_t row, int count, const PreparedRows& to) {
    for (int r = 0; r < count; ++r) {
      char* steps = to.rows + r * to.stride;
      const int32_t term = fill(row + r, call.bits_of(steps), plane_bytes / 8, to.scales + r);
      for (int p = 0; p < call.row_planes(); ++p) {
        char* plane = steps + p * plane_bytes;
        call.kernels->spread(call.bits_of(plane), call.words, plane);
      }
      std::memcpy(steps + call.term_at(), &term, sizeof(term));
    }
  });
}

Status check_linear(const BitplaneLinear& args) {
  const PlaneMatrix& w = args.weight;
  Status status = check_binary_sizes(args.m, w.rows, args.k);
  if (status.ok()) status = check_static_grid(&args.input_scale, &args.input_zero_point, args.input_quant_max);
  if (status.ok()) status = check_matrix("weight_planes", w, args.k);
  if (status.ok()) {
    const PlaneCodes inputs(planes_of(args.input_quant_max), PlaneForm::kUnsigned);
    status = check_plane_sums(inputs, PlaneCodes(w.bits, w.form), args.k);
  }
  if (status.ok()) status = check_pointer("x", args.x, args.m * args.k);
  if (status.ok()) status = check_pointer("y", args.y, args.m * w.rows);
  if (status.ok()) status = check_pointer("weight_sum", args.weight_sum, w.rows);
  if (status.ok()) status = check_pointer("weight_scale", args.weight_scale, w.rows);
  return status.ok() ? check_weight_scale(args.weight_scale, w.rows) : status;
}

// As measured at 16 to 1024 rows of 768 to 4096 features on a CPU that has all of these; where int8 products are quick
// and bits are counted by table, from the peaks of both.
int pairs_of([[maybe_unused]] const BinaryKernels& binary, [[maybe_unused]] const Int8Kernels& int8) {
#if defined(KDQ_HAVE_X86)
  if (&binary == &kBinaryAvx512Vpopcntdq) return 4;
  if (&binary == &kBinaryAvx512) return &int8 == &kInt8Avx512 ? 4 : 0;
  if (&binary == &kBinaryAvx2) return 2;
#endif
  return 0;
}

}  // namespace

Status bitplane_pairs(int* pairs) {
  const BinaryKernels* binary = nullptr;
  const Int8Kernels* int8 = nullptr;
  Status status = binary_kernels(&binary);
  if (status.ok()) status = int8_kernels(&int8);
  if (status.ok()) *pairs = pairs_of(*binary, *int8);
  return status;
}

Status pack_bitplanes(const void* q, int64_t rows, int64_t k, int bits, PlaneForm form, uint64_t* planes,
                      const ParallelFor& parallel_for) {
  Status status = check_binary_sizes(rows, 0, k);
  if (status.ok()) status = check_plane_count("bits", bits, form);
  if (status.ok()) status = check_pointer("q", q, rows * k);
  if (status.ok()) status = check_pointer("planes", planes, rows * k);
  if (!status.ok()) return status;
  const PlaneCodes codes(bits, form);
  if (form == PlaneForm::kUnsigned) {
    return pack_rows(static_cast<const uint8_t*>(q), rows, k, bits, codes, planes, parallel_for);
  }
  return pack_rows(static_cast<const int8_t*>(q), rows, k, bits, codes, planes, parallel_for);
}

Status unpack_bitplanes(const uint64_t* planes, int64_t rows, int64_t k, int bits, PlaneForm form, void* q,
                        const ParallelFor& parallel_for) {
  Status status = check_binary_sizes(rows, 0, k);
  if (status.ok()) status = check_matrix("planes", {planes, rows, bits, form}, k);
  if (status.ok()) status = check_pointer("q", q, rows * k);
  if (!status.ok()) return status;
  const PlaneCodes codes(bits, form);
  const int64_t words = binary_words(k);
  parallel_range(parallel_for, rows, row_grain(k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint64_t* row = planes + r * words;
      if (form == PlaneForm::kUnsigned) {
        unpack_row(row, k, bits, codes, rows * words, static_cast<uint8_t*>(q) + r * k);
      } else {
        unpack_row(row, k, bits, codes, rows * words, static_cast<int8_t*>(q) + r * k);
      }
    }
  });
  return status;
}

Status bitplane_matmul(const PlaneMatrix& a, const PlaneMatrix& b, int64_t k, int32_t* out,
                       const ParallelFor& parallel_for) {
  const BinaryKernels* kernels = nullptr;
  Status status = binary_kernels(&kernels);
  if (status.ok()) status = check_binary_sizes(a.rows, b.rows, k);
  if (status.ok()) status = check_matrix("a_planes", a, k);
  if (status.ok()) status = check_matrix("b_planes", b, k);
  if (!status.ok()) return status;
  const PlaneCodes a_codes(a.bits, a.form);
  const PlaneCodes b_codes(b.bits, b.form);
  status = check_plane_sums(a_codes, b_codes, k);
  if (status.ok()) status = check_pointer("out", out, a.rows * b.rows);
  if (!status.ok() || a.rows * b.rows == 0) return status;

  const int64_t words = binary_words(k);
  Scratch sums(static_cast<size_t>(b.rows) * sizeof(int32_t));
  if (sums.data() == nullptr) return Status::internal("out of memory for the sums of b");
  int32_t* column_sum = reinterpret_cast<int32_t*>(sums.data());
  parallel_range(parallel_for, b.rows, row_grain(k), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      column_sum[c] = static_cast<int32_t>(sum_of(b.planes + c * words, b.rows * words, words, k, b.bits, b_codes));
    }
  });
  const PlaneFactors factors(a_codes, b_codes, k);
  BinaryPlanes planes = {a.bits, b.bits, {factors.column_sum, factors.count, nullptr, nullptr, {}}};
  planes.epilogue.layer.column_sum = column_sum;
  const BinaryCall call = {kernels, b.planes, a.rows, b.rows, words, {}, Result::kInt32, out, &planes};
  return run(call, {}, parallel_for, [&](int64_t row, uint64_t* to, int64_t stride, float* scale) {
    const uint64_t* from = a.planes + row * words;
    *scale = 1.0F;
    for (int p = 0; p < a.bits; ++p) {
      std::copy_n(from + p * a.rows * words, words, to + p * stride);
    }
    return factors.row_term(sum_of(to, stride, words, k, a.bits, a_codes));
  });
}

Status bitplane_linear(const BitplaneLinear& args, const ParallelFor& parallel_for) {
  const BinaryKernels* kernels = nullptr;
  Status status = binary_kernels(&kernels);
  if (status.ok()) status = check_linear(args);
  const PlaneMatrix& w = args.weight;
  if (!status.ok() || args.m * w.rows == 0) return status;
  const int bits = planes_of(args.input_quant_max);
  const PlaneFactors factors(PlaneCodes(bits, PlaneForm::kUnsigned), PlaneCodes(w.bits, w.form), args.k);
  const BinaryPlanes planes = {
      bits,
      w.bits,
      {factors.column_sum,
       factors.count,
       nullptr,
       nullptr,
       {args.weight_sum, args.input_zero_point, args.weight_scale, args.bias, args.activation}}};
  const BinaryCall call = {kernels, w.planes, args.m, w.rows, binary_words(args.k), {}, static_cast<Result>(args.dtype),
                           args.y,  &planes};
  const StaticGrid grid = {1.0F / args.input_scale, args.input_zero_point, args.input_quant_max};
  const auto pack_planes = kernels->pack_planes[static_cast<int>(args.dtype)];
  const BinaryInput input = {static_cast<const char*>(args.x), args.k * static_cast<int64_t>(dtype_size(args.dtype))};
  return run(call, input, parallel_for, [&](int64_t row, uint64_t* to, int64_t stride, float* scale) {
    const PlaneRow packed = pack_planes({input.x + row * input.row_bytes, args.k, grid, bits, to, stride});
    *scale = packed.has_nan ? NAN : args.input_scale;
    return factors.row_term(packed.sum);
  });
}

}  // namespace kdq
