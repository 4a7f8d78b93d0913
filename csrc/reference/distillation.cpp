// The specification of the distillation loss, one element at a time, as include/kdq/distillation.h writes it.
#include <cmath>
#include <limits>

#include "core/distillation_kernels.h"
#include "reference/scalar.h"

namespace kdq {
namespace {

using reference::load;
using reference::store;

// A share below e^-87.3 (1e-38, the smallest normal float32) is none.
float exp_or_zero(float x) { return x < -87.3F ? 0.0F : std::exp(x); }

struct Loops {
  template <class T>
  static float largest(const void* x, int64_t n) {
    float result = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < n; ++i) {
      const float value = load(static_cast<const T*>(x) + i);
      if (std::isnan(value)) return value;
      result = value > result ? value : result;
    }
    return result;
  }

  template <class T>
  static void sums(const void* student, const void* teacher, int64_t n, const DistillationRow& row,
                   const DistillationTerms& terms, DistillationSums* sums) {
    *sums = {};
    for (int64_t i = 0; i < n; ++i) {
      const float s = load(static_cast<const T*>(student) + i) - row.student_max;
      if (terms.label) sums->label += exp_or_zero(s);
      if (!terms.soft) continue;
      const float t = load(static_cast<const T*>(teacher) + i) - row.teacher_max;
      const float weight = exp_or_zero(t * terms.inverse_temperature);
      sums->student += exp_or_zero(s * terms.inverse_temperature);
      sums->teacher += weight;
      if (weight != 0.0F) sums->difference += static_cast<double>(weight) * (static_cast<double>(t) - s);
    }
  }

  template <class T>
  static void gradient(const void* student, const void* teacher, int64_t n, const DistillationRow& row,
                       const DistillationTerms& terms, const DistillationGradient& gradient, void* grad) {
    for (int64_t i = 0; i < n; ++i) {
      const float s = load(static_cast<const T*>(student) + i) - row.student_max;
      float result = gradient.offset;
      if (terms.label) result += gradient.label_scale * exp_or_zero(s) / row.label_sum;
      if (terms.soft) {
        const float t = load(static_cast<const T*>(teacher) + i) - row.teacher_max;
        const float q = exp_or_zero(s * terms.inverse_temperature) / row.student_sum;
        const float p = exp_or_zero(t * terms.inverse_temperature) / row.teacher_sum;
        result += gradient.soft_scale * (q - p);
      }
      store(static_cast<T*>(grad) + i, result);
    }
  }
};

}  // namespace

const DistillationKernels kDistillationReference = make_distillation_kernels<Loops>();

}  // namespace kdq
