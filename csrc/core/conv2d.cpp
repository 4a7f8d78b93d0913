// What convolutions share: their sizes, and the order of images in memory.
#include "kdq/conv2d.h"

#include <algorithm>
#include <string>

#include "core/checks.h"
#include "core/conv2d_sizes.h"
#include "core/parallel_range.h"

namespace kdq {
namespace {

// Squares of so many elements: each line of x and of y that they touch is used while it is in L1.
constexpr int64_t kSquare = 8;

// Columns first ... end - 1 of x [rows, columns] to rows of y [columns, rows].
template <class T>
void transpose(const T* x, int64_t rows, int64_t columns, int64_t first, int64_t end, T* y) {
  for (int64_t r = 0; r < rows; r += kSquare) {
    for (int64_t c = first; c < end; c += kSquare) {
      const T* from = x + r * columns + c;
      T* to = y + c * rows + r;
      if (r + kSquare <= rows && c + kSquare <= end) {  // of constant size, for the compiler
        for (int64_t j = 0; j < kSquare; ++j) {
          for (int64_t i = 0; i < kSquare; ++i) to[j * rows + i] = from[i * columns + j];
        }
      } else {
        for (int64_t j = 0; j < std::min(kSquare, end - c); ++j) {
          for (int64_t i = 0; i < std::min(kSquare, rows - r); ++i) to[j * rows + i] = from[i * columns + j];
        }
      }
    }
  }
}

template <class T>
void transpose_all(const T* x, int64_t images, int64_t rows, int64_t columns, T* y, const ParallelFor& parallel_for) {
  constexpr int64_t kElementsWorthAThread = 1 << 15;
  constexpr int64_t kPiece = 8 * kSquare;  // columns
  const int64_t pieces = (columns + kPiece - 1) / kPiece;
  const int64_t grain = kElementsWorthAThread / (kPiece * rows + 1) + 1;
  parallel_range(parallel_for, images * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i / pieces * rows * columns;
      const int64_t first = i % pieces * kPiece;
      transpose(x + at, rows, columns, first, std::min(first + kPiece, columns), y + at);
    }
  });
}

}  // namespace

Status conv2d_output(const Conv2dShape& shape, int64_t* height, int64_t* width) {
  return conv2d_sizes(shape, height, width);
}

Status transpose_images(size_t element_bytes, const void* x, int64_t images, int64_t rows, int64_t columns, void* y,
                        const ParallelFor& parallel_for) {
  if (images < 0 || rows < 0 || columns < 0) return Status::invalid("x: expected sizes of at least 0");
  Status status = check_pointer("x", x, images * rows * columns);
  if (status.ok()) status = check_pointer("y", y, images * rows * columns);
  if (!status.ok()) return status;
  if (element_bytes == sizeof(uint32_t)) {
    transpose_all(static_cast<const uint32_t*>(x), images, rows, columns, static_cast<uint32_t*>(y), parallel_for);
  } else if (element_bytes == sizeof(uint16_t)) {
    transpose_all(static_cast<const uint16_t*>(x), images, rows, columns, static_cast<uint16_t*>(y), parallel_for);
  } else {
    return Status::invalid("element_bytes: expected 2 or 4, got " + std::to_string(element_bytes));
  }
  return {};
}

}  // namespace kdq
