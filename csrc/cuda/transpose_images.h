// Images with their channels first to images with their channels last, and back, on a GPU.
#pragma once

#include "core/checks.h"
#include "cuda/elements.h"

namespace kdq::cuda {

// x [images, rows, columns] -> y [images, columns, rows]. A block takes a square of kSide x kSide, which it turns in
// shared memory, so that neighbouring threads read and write neighbouring elements.
template <class T>
struct TransposeImages {
  static constexpr int kSide = 32;
  static constexpr int kThreads = 256;
  static constexpr int kStep = kThreads / kSide;
  struct Shared {
    T square[kSide][kSide + 1];  // the columns then lie in different banks
  };

  const T* x;
  T* y;
  int64_t images;
  int64_t rows;
  int64_t columns;

  KDQ_HOST_DEVICE int64_t across() const { return (columns + kSide - 1) / kSide; }
  KDQ_HOST_DEVICE int64_t squares() const { return (rows + kSide - 1) / kSide * across(); }  // of an image
  int64_t blocks() const { return images * squares(); }

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t image = thread.block() / squares();
    const int64_t square = thread.block() - image * squares();
    const int64_t row = square / across() * kSide;
    const int64_t column = square * kSide - row * across();
    const int beside = thread.index() % kSide;
    const T* from = x + image * rows * columns;
    T* to = y + image * rows * columns;
    for (int i = thread.index() / kSide; i < kSide; i += kStep) {
      if (row + i >= rows || column + beside >= columns) continue;
      shared.square[i][beside] = thread.load(from + (row + i) * columns + column + beside);
    }
    thread.sync();
    for (int i = thread.index() / kSide; i < kSide; i += kStep) {
      if (column + i >= columns || row + beside >= rows) continue;
      thread.store(to + (column + i) * rows + row + beside, shared.square[beside][i]);
    }
  }
};

template <class Launcher>
Status launch_transpose_images(const Launcher& launcher, size_t element_bytes, const void* x, int64_t images,
                               int64_t rows, int64_t columns, void* y) {
  if (images < 0 || rows < 0 || columns < 0) return Status::invalid("x: expected sizes of at least 0");
  Status status = check_pointer("x", x, images * rows * columns);
  if (status.ok()) status = check_pointer("y", y, images * rows * columns);
  if (!status.ok()) return status;
  const auto launch = [&](auto element) {
    using T = decltype(element);
    const TransposeImages<T> kernel = {static_cast<const T*>(x), static_cast<T*>(y), images, rows, columns};
    return launcher.run(kernel, kernel.blocks());
  };
  if (element_bytes == sizeof(uint32_t)) return launch(uint32_t());
  if (element_bytes == sizeof(uint16_t)) return launch(uint16_t());
  return Status::invalid("element_bytes: expected 2 or 4, got " + std::to_string(element_bytes));
}

}  // namespace kdq::cuda
