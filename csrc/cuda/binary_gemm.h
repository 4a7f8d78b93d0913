// binary_matmul on a GPU: the tiled product on bits.
#pragma once

#include "core/checks.h"
#include "cuda/product.h"
#include "kdq/binary_gemm.h"

namespace kdq::cuda {

// k - 2 popcount(a xor b). Unsigned steps wrap where k is near 2^31; the result fits.
struct DotOutput {
  int32_t* out;
  int64_t cols;
  uint32_t k;

  template <class Thread>
  KDQ_DEVICE void store(Thread& thread, int64_t row, int64_t col, int32_t both, uint32_t row_bits,
                        uint32_t col_bits) const {
    const uint32_t different = row_bits + col_bits - 2U * static_cast<uint32_t>(both);
    thread.store(out + row * cols + col, static_cast<int32_t>(k - 2U * different));
  }
};

template <class Launcher>
Status launch_binary_matmul(const Launcher& launcher, const uint64_t* a_bits, const uint64_t* b_bits, int64_t m,
                            int64_t n, int64_t k, int32_t* out) {
  Status status = check_binary_sizes(m, n, k);
  if (status.ok()) status = check_pointer("a_bits", a_bits, m * k);
  if (status.ok()) status = check_pointer("b_bits", b_bits, n * k);
  if (status.ok()) status = check_pointer("out", out, m * n);
  if (!status.ok()) return status;
  const int64_t row_bytes = binary_words(k) * static_cast<int64_t>(sizeof(uint64_t));
  const TiledProduct<BinaryProduct, DotOutput> kernel = {
      operand_of(a_bits, m, row_bytes), operand_of(b_bits, n, row_bytes), {out, n, static_cast<uint32_t>(k)}};
  return launcher.run(kernel, kernel.blocks());
}

}  // namespace kdq::cuda
