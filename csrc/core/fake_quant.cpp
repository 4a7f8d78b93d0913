// Public functions of the fake-quant family, but for the gradients: check, cut into runs, call the ISA's loops.
#include "kdq/fake_quant.h"

#include <string>

#include "core/checks.h"
#include "core/fake_quant_grid.h"

namespace kdq {
namespace {

// The start of everything here: chooses kernels, prepares the grid, checks the two buffers.
Status begin(const QuantShape& shape, const QuantGrid& grid, const char* in_name, const void* in, const char* out_name,
             const void* out, const FakeQuantKernels** kernels, PreparedGrid* prepared) {
  Status status = fake_quant_kernels(kernels);
  if (status.ok()) status = prepare_grid(shape, grid, prepared);
  if (!status.ok()) return status;
  const int64_t n = prepared->layout.rows * prepared->layout.row_length;
  status = check_pointer(in_name, in, n);
  if (status.ok()) status = check_pointer(out_name, out, n);
  return status;
}

}  // namespace

Status fake_quantize(DType dtype, const void* x, void* y, const QuantShape& shape, const QuantGrid& grid,
                     const ParallelFor& parallel_for) {
  const FakeQuantKernels* kernels = nullptr;
  PreparedGrid prepared;
  Status status = begin(shape, grid, "x", x, "y", y, &kernels, &prepared);
  if (!status.ok()) return status;
  const RunLayout& layout = prepared.layout;
  const size_t size = dtype_size(dtype);
  const bool streamed = worth_streaming(layout, x, y, size);
  const auto loop = kernels->forward[static_cast<int>(dtype)][layout.form][streamed];
  for_each_tile(layout, streamed ? kStreamedPiece : kEachPiece, parallel_for,
                [&](int64_t row, int64_t offset, int64_t n, int64_t rows) {
                  const int64_t first = row * layout.row_length + offset;
                  loop(at(x, first, size), at(y, first, size), n, prepared.at(row, offset), rows, layout.row_length);
                });
  return status;
}

Status quantize(DType dtype, const void* x, QType qtype, void* q, const QuantShape& shape, const QuantGrid& grid,
                const ParallelFor& parallel_for) {
  const FakeQuantKernels* kernels = nullptr;
  PreparedGrid prepared;
  Status status = begin(shape, grid, "x", x, "q", q, &kernels, &prepared);
  if (status.ok()) status = check_fits(qtype, grid);
  if (!status.ok()) return status;
  const RunLayout& layout = prepared.layout;
  const auto loop = kernels->quantize[static_cast<int>(dtype)][static_cast<int>(qtype)][layout.form];
  for_each_run(layout, parallel_for, [&](int64_t row, int64_t offset, int64_t n) {
    const int64_t first = row * layout.row_length + offset;
    loop(at(x, first, dtype_size(dtype)), at(q, first, qtype_size(qtype)), n, prepared.at(row, offset));
  });
  return status;
}

Status dequantize(QType qtype, const void* q, float* y, const QuantShape& shape, const QuantGrid& grid,
                  const ParallelFor& parallel_for) {
  const FakeQuantKernels* kernels = nullptr;
  PreparedGrid prepared;
  Status status = begin(shape, grid, "q", q, "y", y, &kernels, &prepared);
  if (!status.ok()) return status;
  const RunLayout& layout = prepared.layout;
  const auto loop = kernels->dequantize[static_cast<int>(qtype)][layout.form];
  for_each_run(layout, parallel_for, [&](int64_t row, int64_t offset, int64_t n) {
    const int64_t first = row * layout.row_length + offset;
    loop(at(q, first, qtype_size(qtype)), y + first, n, prepared.at(row, offset));
  });
  return status;
}

}  // namespace kdq
