// The loops of the distillation loss, written once against Vec. An ISA file includes its vec_*.h first, then this.
//
// They are bound by their exponentials (up to three an element, some 15 instructions each a vector), not by memory: so
// the maxima are found in a pass of their own, which costs a tenth, instead of being corrected on the way, and at the
// usual temperatures of 2 and 4 the third, e^s, is a power of another, e^(s / T). That multiplies its error of 2 ulp by
// T.
#pragma once

#include "core/distillation_kernels.h"
#include "x86/exp_simd.h"
#include "x86/loops_simd.h"

namespace kdq {
namespace {

constexpr float kInfinity = __builtin_inff();

// What is computed of the labels: nothing, e^s by itself, or e^s as this power of e^(s / T).
enum Label : int { kNoLabel = 0, kOwn = 1, kSquare = 2, kFourth = 4 };

struct Loops {
  using F = Vec::Float;
  static constexpr int kLanes = Vec::kLanes;

  template <class T>
  static float largest(const void* x_raw, int64_t count) {
    const T* x = static_cast<const T*>(x_raw);
    F result = Vec::set(-kInfinity);
    uint32_t nan_lanes = 0;
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const F value = fill(load(x + i, n), n);
      nan_lanes |= Vec::bits(Vec::is_nan(value));
      result = Vec::select(Vec::less(result, value), value, result);
    });
    return nan_lanes != 0 ? __builtin_nanf("") : Vec::largest(result);
  }

  template <class T>
  static void sums(const void* student, const void* teacher, int64_t count, const DistillationRow& row,
                   const DistillationTerms& terms, DistillationSums* total) {
    *total = {};
    const T* s = static_cast<const T*>(student);
    const T* t = static_cast<const T*>(teacher);
    constexpr decltype(&block_sums<T, true, kOwn>) kSoft[] = {block_sums<T, true, kNoLabel>, block_sums<T, true, kOwn>,
                                                              block_sums<T, true, kSquare>, nullptr,
                                                              block_sums<T, true, kFourth>};
    const auto block = terms.soft ? kSoft[label_of(terms)] : block_sums<T, false, kOwn>;
    for (int64_t i = 0; i < count; i += kDistillationBlock) {
      const int64_t n = count - i < kDistillationBlock ? count - i : kDistillationBlock;
      block(s + i, t + i, n, row, terms.inverse_temperature, total);
    }
  }

  template <class T>
  static void gradient(const void* student, const void* teacher, int64_t count, const DistillationRow& row,
                       const DistillationTerms& terms, const DistillationGradient& gradient, void* grad) {
    constexpr decltype(&gradient_loop<T, true, kOwn>) kSoft[] = {
        gradient_loop<T, true, kNoLabel>, gradient_loop<T, true, kOwn>, gradient_loop<T, true, kSquare>, nullptr,
        gradient_loop<T, true, kFourth>};
    const auto loop = terms.soft ? kSoft[label_of(terms)] : gradient_loop<T, false, kOwn>;
    loop(static_cast<const T*>(student), static_cast<const T*>(teacher), count, row, terms.inverse_temperature,
         gradient, static_cast<T*>(grad));
  }

 private:
  static Label label_of(const DistillationTerms& terms) {
    if (!terms.label) return kNoLabel;
    return terms.inverse_temperature == 0.5F ? kSquare : terms.inverse_temperature == 0.25F ? kFourth : kOwn;
  }

  // e^s, where soft is e^(s / T).
  template <Label kLabel>
  static F label_exp(F s, F soft) {
    if (kLabel == kOwn) return exp_or_zero(s);
    const F square = Vec::mul(soft, soft);
    return kLabel == kSquare ? square : Vec::mul(square, square);
  }

  // Lanes past the end of a partial vector become -inf: largest passes over them, and their exponentials are 0.
  static F fill(F value, int n) {
    return n == kLanes ? value : Vec::select(Vec::first_lanes(n), value, Vec::set(-kInfinity));
  }

  template <class T, bool kSoft, Label kLabel>
  static void block_sums(const T* student, const T* teacher, int64_t count, const DistillationRow& row,
                         float inverse_temperature, DistillationSums* total) {
    const F inverse = Vec::set(inverse_temperature);
    const F student_max = Vec::set(row.student_max);
    const F teacher_max = Vec::set(row.teacher_max);
    F student_sum = Vec::zero();
    F teacher_sum = Vec::zero();
    F label_sum = Vec::zero();
    F difference = Vec::zero();
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const F s = Vec::sub(fill(load(student + i, n), n), student_max);
      const F soft = kSoft ? exp_or_zero(Vec::mul(s, inverse)) : Vec::zero();
      if (kLabel != kNoLabel) label_sum = Vec::add(label_sum, label_exp<kLabel>(s, soft));
      if (kSoft) {
        const F t = Vec::sub(fill(load(teacher + i, n), n), teacher_max);
        const F weight = exp_or_zero(Vec::mul(t, inverse));
        student_sum = Vec::add(student_sum, soft);
        teacher_sum = Vec::add(teacher_sum, weight);
        // A product with weight 0 would be NaN where both logits are -inf.
        const F term = Vec::mul(weight, Vec::sub(t, s));
        difference = Vec::add(difference, Vec::select(Vec::equal(weight, Vec::zero()), Vec::zero(), term));
      }
    });
    if (kSoft) {
      total->student += Vec::sum(student_sum);
      total->teacher += Vec::sum(teacher_sum);
      total->difference += Vec::sum(difference);
    }
    if (kLabel != kNoLabel) total->label += Vec::sum(label_sum);
  }

  template <class T, bool kSoft, Label kLabel>
  static void gradient_loop(const T* student, const T* teacher, int64_t count, const DistillationRow& row,
                            float inverse_temperature, const DistillationGradient& gradient, T* grad) {
    const F inverse = Vec::set(inverse_temperature);
    const F student_max = Vec::set(row.student_max);
    const F teacher_max = Vec::set(row.teacher_max);
    const F student_scale = Vec::set(kSoft ? gradient.soft_scale / row.student_sum : 0.0F);
    const F teacher_scale = Vec::set(kSoft ? -gradient.soft_scale / row.teacher_sum : 0.0F);
    const F label_scale = Vec::set(kLabel != kNoLabel ? gradient.label_scale / row.label_sum : 0.0F);
    const F offset = Vec::set(gradient.offset);
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const F s = Vec::sub(load(student + i, n), student_max);
      F result = offset;
      const F soft = kSoft ? exp_or_zero(Vec::mul(s, inverse)) : Vec::zero();
      if (kLabel != kNoLabel) result = Vec::fma(label_exp<kLabel>(s, soft), label_scale, result);
      if (kSoft) {
        const F t = Vec::sub(load(teacher + i, n), teacher_max);
        const F q = Vec::mul(soft, student_scale);
        const F p = Vec::mul(exp_or_zero(Vec::mul(t, inverse)), teacher_scale);
        result = Vec::add(result, Vec::add(q, p));  // no fma: equal logits give exactly 0
      }
      store(grad + i, result, n);
    });
  }
};

}  // namespace
}  // namespace kdq
