// What an ISA provides for the distillation loss: loops over one row of logits. Indexed by DType.
#pragma once

#include <cstdint>

#include "core/elements.h"
#include "kdq/distillation.h"

namespace kdq {

// exp(x * inverse_temperature) for the soft terms. What a loss does not need is not computed: soft is off for alpha 0,
// label for alpha 1, and for T = 1, where the soft sum of the student serves both.
struct DistillationTerms {
  float inverse_temperature;
  bool soft;
  bool label;
};

struct DistillationSums {
  double student;     // Z_s
  double teacher;     // Z_t
  double label;       // Z
  double difference;  // sum exp(t' / T) (t' - s'), over classes where the exponential is not 0
};

// grad = soft_scale (exp(s' / T) / Z_s - exp(t' / T) / Z_t) + label_scale exp(s') / Z + offset
struct DistillationGradient {
  float soft_scale;
  float label_scale;
  float offset;
};

struct DistillationKernels {
  // The largest element; NaN where there is one; -inf if n is 0.
  float (*largest[3])(const void* x, int64_t n);
  // Uses the maxima of row.
  void (*sums[3])(const void* student, const void* teacher, int64_t n, const DistillationRow& row,
                  const DistillationTerms& terms, DistillationSums* sums);
  // grad may be student.
  void (*gradient[3])(const void* student, const void* teacher, int64_t n, const DistillationRow& row,
                      const DistillationTerms& terms, const DistillationGradient& gradient, void* grad);
};

// Elements that are summed in float32 before the sum goes on in float64.
constexpr int64_t kDistillationBlock = 2048;

// The table of an ISA whose loops are the static members of L, templates on the element type. L lives in an anonymous
// namespace, so nothing here has external linkage.
template <class L>
constexpr DistillationKernels make_distillation_kernels() {
  return {
      {L::template largest<float>, L::template largest<BFloat16>, L::template largest<Float16>},
      {L::template sums<float>, L::template sums<BFloat16>, L::template sums<Float16>},
      {L::template gradient<float>, L::template gradient<BFloat16>, L::template gradient<Float16>},
  };
}

extern const DistillationKernels kDistillationReference;
extern const DistillationKernels kDistillationAvx2;
extern const DistillationKernels kDistillationAvx512;

}  // namespace kdq
