// The specification of the codebook family: one row, one channel, one index at a time.
#include "kdq/codebook.h"
#include "core/codebook_kernels.h"
#include "reference/activation.h"
#include "reference/scalar.h"

namespace kdq {
namespace {

struct Loops {
  static int panels_at_once(int) { return 1; }

  template <class T>
  static void widen(const void* x, int64_t k, int64_t padded, float* row) {
    for (int64_t i = 0; i < padded; ++i) row[i] = i < k ? reference::load(static_cast<const T*>(x) + i) : 0.0F;
  }

  static void tile(const CodebookTileCall& call) {
    const int per_word = 32 / call.bits;
    for (int c = 0; c < call.out.cols; ++c) {
      float sum = 0.0F;
      for (int64_t i = 0; i < call.steps * per_word; ++i) {
        const uint32_t word = call.panels.words[i / per_word * kCodebookLanes + c];
        sum += call.rows[i] * call.table[word >> (i % per_word * call.bits) & ((1U << call.bits) - 1U)];
      }
      const float y = reference::activate(sum + (call.bias == nullptr ? 0.0F : call.bias[c]), call.activation);
      reference::store_as(call.out.type, call.out.y, c, y);
    }
  }
};

}  // namespace

const CodebookKernels kCodebookReference = make_codebook_kernels<Loops>(1);

}  // namespace kdq
