// The distillation loss and its gradient on a GPU: a block a row, which reads its logits twice for the loss (maxima,
// then sums; the second time from a cache) and once for the gradient. Formulas: include/kdq/distillation.h.
#pragma once

#include <cmath>

#include "core/checks.h"
#include "cuda/reduce.h"
#include "kdq/distillation.h"

namespace kdq::cuda {

// Shares below the smallest normal float32 are none.
KDQ_DEVICE float exp_or_zero(float x) { return x < -87.3F ? 0.0F : expf(x); }

// What is the same in every row.
template <class T>
struct DistillationArgs {
  const T* student;
  const T* teacher;
  const int64_t* target;  // or nullptr
  int64_t rows;
  int64_t classes;
  float temperature;
  float inverse_temperature;
  float alpha;
  bool wide;  // rows are multiples of 16 bytes

  KDQ_DEVICE bool is_soft() const { return alpha > 0.0F; }
  KDQ_DEVICE bool is_labelled() const { return alpha < 1.0F; }
  // For T = 1 the student's soft sum serves the labels too.
  KDQ_DEVICE bool needs_label_sum() const { return is_labelled() && (temperature != 1.0F || !is_soft()); }
};

struct LogitSums {
  double student = 0.0;
  double teacher = 0.0;
  double label = 0.0;
  double difference = 0.0;
};

template <class T>
struct DistillationRows {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarp;
  struct Shared {
    float maxima[2][kWarps];
    double sums[4][kWarps];
  };

  DistillationArgs<T> args;
  DistillationRow* statistics;
  double* losses;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    const int64_t row = thread.block();
    const int64_t target = args.target == nullptr ? 0 : thread.load(args.target + row);
    if (target == kIgnoredTarget) {
      if (thread.index() == 0) thread.store(statistics + row, DistillationRow{});
      if (thread.index() == 0) thread.store(losses + row, 0.0);
      return;
    }
    DistillationRow kept = {};
    kept.student_max = largest(thread, shared.maxima[0], args.student + row * args.classes);
    if (args.is_soft()) kept.teacher_max = largest(thread, shared.maxima[1], args.teacher + row * args.classes);
    LogitSums sums = own_sums(thread, row * args.classes, kept);
    sums.student = reduce_block(thread, shared.sums[0], sums.student, Sum());
    sums.teacher = reduce_block(thread, shared.sums[1], sums.teacher, Sum());
    sums.label = reduce_block(thread, shared.sums[2], sums.label, Sum());
    sums.difference = reduce_block(thread, shared.sums[3], sums.difference, Sum());
    if (thread.index() != 0) return;
    if (!args.needs_label_sum()) sums.label = sums.student;
    kept.student_sum = static_cast<float>(sums.student);
    kept.teacher_sum = static_cast<float>(sums.teacher);
    kept.label_sum = static_cast<float>(sums.label);
    thread.store(statistics + row, kept);
    thread.store(losses + row, loss(thread, row, target, kept, sums));
  }

 private:
  template <class Thread>
  KDQ_DEVICE float largest(Thread& thread, float (&shared)[kWarps], const T* logits) const {
    float result = -INFINITY;
    for (int64_t i = int64_t{thread.index()} * kChunk<T>; i < args.classes; i += kThreads * kChunk<T>) {
      float values[kChunk<T>];
      load_chunk(thread, logits + i, args.wide, args.classes - i, values);
      for (int e = 0; e < kChunk<T>; ++e) {
        if (i + e < args.classes) result = Largest()(result, values[e]);
      }
    }
    return reduce_block(thread, shared, result, Largest());
  }

  // Over this thread's classes: a chunk in float32, chunks in float64.
  template <class Thread>
  KDQ_DEVICE LogitSums own_sums(Thread& thread, int64_t first, const DistillationRow& kept) const {
    LogitSums sums;
    for (int64_t i = int64_t{thread.index()} * kChunk<T>; i < args.classes; i += kThreads * kChunk<T>) {
      float student[kChunk<T>];
      float teacher[kChunk<T>] = {};
      load_chunk(thread, args.student + first + i, args.wide, args.classes - i, student);
      if (args.is_soft()) load_chunk(thread, args.teacher + first + i, args.wide, args.classes - i, teacher);
      float soft = 0.0F;
      float weights = 0.0F;
      float label = 0.0F;
      float difference = 0.0F;
      for (int e = 0; e < kChunk<T>; ++e) {
        if (i + e >= args.classes) continue;
        const float s = student[e] - kept.student_max;
        if (args.needs_label_sum()) label += exp_or_zero(s);
        if (!args.is_soft()) continue;
        const float t = teacher[e] - kept.teacher_max;
        const float weight = exp_or_zero(t * args.inverse_temperature);
        soft += exp_or_zero(s * args.inverse_temperature);
        weights += weight;
        // A product with weight 0 would be NaN where both logits are -inf.
        if (weight != 0.0F) difference += weight * (t - s);
      }
      sums.student += static_cast<double>(soft);
      sums.teacher += static_cast<double>(weights);
      sums.label += static_cast<double>(label);
      sums.difference += static_cast<double>(difference);
    }
    return sums;
  }

  template <class Thread>
  KDQ_DEVICE double loss(Thread& thread, int64_t row, int64_t target, const DistillationRow& kept,
                         const LogitSums& sums) const {
    using Bits = typename Element<T>::Bits;
    double result = 0.0;
    if (args.is_soft()) {
      const double t = static_cast<double>(args.temperature);
      const double kl = sums.difference / (t * sums.teacher) - log(sums.teacher) + log(sums.student);
      result += static_cast<double>(args.alpha) * t * t * kl;
    }
    if (target < 0 || target >= args.classes) return NAN;  // not a class: the caller sees it, and no memory is touched
    if (args.is_labelled()) {
      const Bits* logits = reinterpret_cast<const Bits*>(args.student + row * args.classes);
      const float logit = Element<T>::widen(thread.load(logits + target));
      const double shifted = static_cast<double>(logit) - static_cast<double>(kept.student_max);
      result += (1.0 - static_cast<double>(args.alpha)) * (log(sums.label) - shifted);
    }
    return result;
  }
};

// One block: how many rows are kept and, unless losses is null, the mean over them, in a fixed order.
struct DistillationMean {
  static constexpr int kThreads = 256;
  struct Shared {
    double sums[kThreads / kWarp];
    double counts[kThreads / kWarp];
  };
  const double* losses;   // or nullptr
  const int64_t* target;  // or nullptr
  int64_t rows;
  float* mean;  // null if losses is
  float* kept;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared& shared) const {
    double sum = 0.0;
    double count = 0.0;
    for (int64_t row = thread.index(); row < rows; row += kThreads) {
      if (losses != nullptr) sum += thread.load(losses + row);
      count += target == nullptr || thread.load(target + row) != kIgnoredTarget ? 1.0 : 0.0;
    }
    sum = reduce_block(thread, shared.sums, sum, Sum());
    count = reduce_block(thread, shared.counts, count, Sum());
    if (thread.index() != 0) return;
    if (losses != nullptr) thread.store(mean, count == 0.0 ? 0.0F : static_cast<float>(sum / count));
    thread.store(kept, static_cast<float>(count));
  }
};

template <class T>
struct DistillationGradient {
  static constexpr int kThreads = 256;
  struct Shared {};

  DistillationArgs<T> args;
  const DistillationRow* statistics;
  const float* kept;
  const float* grad_loss;
  T* grad;

  template <class Thread>
  KDQ_DEVICE void operator()(Thread& thread, Shared&) const {
    const int64_t row = thread.block();
    const int64_t target = args.target == nullptr ? 0 : thread.load(args.target + row);
    const bool ignored = target == kIgnoredTarget;
    const bool valid = target >= 0 && target < args.classes;
    const DistillationRow sums = thread.load(statistics + row);
    const float a_row = thread.load(grad_loss) / thread.load(kept);
    const float soft_scale = args.alpha * args.temperature * a_row;
    const float label_scale = (1.0F - args.alpha) * a_row;
    const float of_label = 1.0F / sums.label_sum;
    const float of_student = 1.0F / sums.student_sum;
    const float of_teacher = 1.0F / sums.teacher_sum;
    for (int64_t i = int64_t{thread.index()} * kChunk<T>; i < args.classes; i += kThreads * kChunk<T>) {
      const int64_t first = row * args.classes + i;
      float student[kChunk<T>];
      float teacher[kChunk<T>] = {};
      float gradient[kChunk<T>];
      load_chunk(thread, args.student + first, args.wide, args.classes - i, student);
      if (args.is_soft()) load_chunk(thread, args.teacher + first, args.wide, args.classes - i, teacher);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        const float s = student[e] - sums.student_max;
        float result = args.is_labelled() && i + e == target ? -label_scale : 0.0F;
        if (args.is_labelled()) result += label_scale * (exp_or_zero(s) * of_label);
        if (args.is_soft()) {
          const float t = teacher[e] - sums.teacher_max;
          const float q = exp_or_zero(s * args.inverse_temperature) * of_student;
          const float p = exp_or_zero(t * args.inverse_temperature) * of_teacher;
          result += soft_scale * (q - p);
        }
        gradient[e] = ignored ? 0.0F : valid ? result : NAN;
      }
      store_floats(thread, grad + first, args.wide, args.classes - i, gradient);
    }
  }
};

template <class T>
DistillationArgs<T> distillation_args(const DistillationLoss& args, const void* grad) {
  const bool aligned = is_aligned(args.student, 16) && is_aligned(args.teacher, 16) && is_aligned(grad, 16);
  return {static_cast<const T*>(args.student),
          static_cast<const T*>(args.teacher),
          args.target,
          args.rows,
          args.classes,
          args.temperature,
          1.0F / args.temperature,
          args.alpha,
          aligned && (args.rows == 1 || args.classes % kChunk<T> == 0)};
}

template <class Launcher>
Status launch_distillation_loss(const Launcher& launcher, const DistillationLoss& args, DistillationRow* statistics,
                                double* row_losses, float* loss, float* kept) {
  Status status = check_distillation(args);
  if (status.ok()) status = check_pointer("statistics", statistics, args.rows);
  if (status.ok()) status = check_pointer("row_losses", row_losses, args.rows);
  if (status.ok()) status = check_pointer("loss", loss, 1);
  if (status.ok()) status = check_pointer("kept", kept, 1);
  if (!status.ok()) return status;
  status = for_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    return launcher.run(DistillationRows<T>{distillation_args<T>(args, nullptr), statistics, row_losses}, args.rows);
  });
  if (!status.ok()) return status;
  return launcher.run(DistillationMean{row_losses, args.target, args.rows, loss, kept}, 1);
}

template <class Launcher>
Status launch_distillation_kept(const Launcher& launcher, const int64_t* target, int64_t rows, float* kept) {
  const Status status = check_pointer("kept", kept, 1);
  if (!status.ok()) return status;
  return launcher.run(DistillationMean{nullptr, target, rows, nullptr, kept}, 1);
}

template <class Launcher>
Status launch_distillation_loss_backward(const Launcher& launcher, const DistillationLoss& args,
                                         const DistillationRow* statistics, const float* kept, const float* grad_loss,
                                         void* grad_student) {
  Status status = check_distillation(args);
  if (status.ok()) status = check_pointer("statistics", statistics, args.rows);
  if (status.ok()) status = check_pointer("kept", kept, args.rows);
  if (status.ok()) status = check_pointer("grad_loss", grad_loss, args.rows);
  if (status.ok()) status = check_pointer("grad_student", grad_student, args.rows);
  if (!status.ok()) return status;
  return for_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const DistillationGradient<T> kernel = {distillation_args<T>(args, grad_student), statistics, kept, grad_loss,
                                            static_cast<T*>(grad_student)};
    return launcher.run(kernel, args.rows);
  });
}

}  // namespace kdq::cuda
