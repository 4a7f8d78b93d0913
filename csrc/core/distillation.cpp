// The distillation loss: validation, rows over threads, and the scalar algebra of a row.
#include "kdq/distillation.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "core/checks.h"
#include "core/distillation_kernels.h"
#include "core/kernel_choice.h"
#include "core/parallel_range.h"

namespace kdq {
namespace {

constexpr KernelChoice<DistillationKernels> kChoices[] = {
    {Isa::kReference, CpuExtra::kNone, &kDistillationReference},
#if defined(KDQ_HAVE_X86)
    {Isa::kAvx2, CpuExtra::kNone, &kDistillationAvx2},
    {Isa::kAvx512, CpuExtra::kNone, &kDistillationAvx512},
#endif
};

// Classes below which waking another thread costs more than it saves (some 10 us of exponentials).
constexpr int64_t kClassesWorthAThread = 8192;

Status check_target(const DistillationLoss& args) {
  if (args.target == nullptr) return {};
  for (int64_t r = 0; r < args.rows; ++r) {
    const int64_t y = args.target[r];
    if (y == kIgnoredTarget || (y >= 0 && y < args.classes)) continue;
    return Status::invalid("target: expected class indices from 0 to " + std::to_string(args.classes - 1) +
                           " (or -100: ignore the row), got " + std::to_string(y) + " at index " + std::to_string(r));
  }
  return {};
}

struct Call {
  const DistillationKernels* kernels = nullptr;
  DistillationTerms terms = {};
  int64_t kept = 0;  // rows that are not ignored

  Status open(const DistillationLoss& args) {
    Status status = choose_kernels(kChoices, &kernels);
    if (status.ok()) status = check_distillation(args);
    if (status.ok()) status = check_target(args);
    for (int64_t r = 0; status.ok() && r < args.rows; ++r) kept += keeps(args, r) ? 1 : 0;
    terms.inverse_temperature = 1.0F / args.temperature;
    terms.soft = args.alpha > 0.0F;
    terms.label = args.alpha < 1.0F && (args.temperature != 1.0F || !terms.soft);
    return status;
  }

  static bool keeps(const DistillationLoss& args, int64_t row) {
    return args.target == nullptr || args.target[row] != kIgnoredTarget;
  }
};

const char* row_of(const DistillationLoss& args, const void* logits, int64_t row) {
  return static_cast<const char*>(logits) + static_cast<size_t>(row * args.classes) * dtype_size(args.dtype);
}

// s'[target], through `largest`, which widens a single element.
double target_logit(const DistillationLoss& args, const Call& call, const char* student, const DistillationRow& row,
                    int64_t target) {
  const char* element = student + static_cast<size_t>(target) * dtype_size(args.dtype);
  return static_cast<double>(call.kernels->largest[static_cast<int>(args.dtype)](element, 1)) - row.student_max;
}

double row_loss(const DistillationLoss& args, const Call& call, int64_t r, DistillationRow* row) {
  const int dtype = static_cast<int>(args.dtype);
  const char* student = row_of(args, args.student, r);
  const char* teacher = row_of(args, args.teacher, r);
  row->student_max = call.kernels->largest[dtype](student, args.classes);
  row->teacher_max = call.terms.soft ? call.kernels->largest[dtype](teacher, args.classes) : 0.0F;
  DistillationSums sums = {};
  call.kernels->sums[dtype](student, teacher, args.classes, *row, call.terms, &sums);
  if (!call.terms.label) sums.label = sums.student;
  row->student_sum = static_cast<float>(sums.student);
  row->teacher_sum = static_cast<float>(sums.teacher);
  row->label_sum = static_cast<float>(sums.label);
  double loss = 0.0;
  if (call.terms.soft) {
    const double t = args.temperature;
    const double kl = sums.difference / (t * sums.teacher) - std::log(sums.teacher) + std::log(sums.student);
    loss += args.alpha * t * t * kl;
  }
  if (args.alpha < 1.0F) {
    loss += (1.0 - args.alpha) * (std::log(sums.label) - target_logit(args, call, student, *row, args.target[r]));
  }
  return loss;
}

}  // namespace

Status distillation_loss(const DistillationLoss& args, DistillationRow* statistics, float* loss,
                         const ParallelFor& parallel_for) {
  Call call;
  const Status status = call.open(args);
  if (!status.ok()) return status;
  std::vector<double> losses(static_cast<size_t>(args.rows), 0.0);
  const int64_t grain = kClassesWorthAThread / args.classes + 1;
  parallel_range(parallel_for, args.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      statistics[r] = {};
      if (Call::keeps(args, r)) losses[static_cast<size_t>(r)] = row_loss(args, call, r, &statistics[r]);
    }
  });
  double total = 0.0;  // in the order of the rows, whoever computed them
  for (double value : losses) total += value;
  *loss = call.kept == 0 ? 0.0F : static_cast<float>(total / static_cast<double>(call.kept));
  return status;
}

Status distillation_loss_backward(const DistillationLoss& args, const DistillationRow* statistics, float grad_loss,
                                  void* grad_student, const ParallelFor& parallel_for) {
  Call call;
  const Status status = call.open(args);
  if (!status.ok() || args.rows == 0) return status;
  const int dtype = static_cast<int>(args.dtype);
  const size_t element = dtype_size(args.dtype);
  const float a_row = grad_loss / static_cast<float>(call.kept);
  const float label = (1.0F - args.alpha) * a_row;
  DistillationTerms terms = call.terms;
  terms.label = args.alpha < 1.0F;
  const DistillationGradient others = {args.alpha * args.temperature * a_row, label, 0.0F};
  const DistillationGradient at_target = {others.soft_scale, label, -label};
  const auto run = call.kernels->gradient[dtype];
  const int64_t grain = kClassesWorthAThread / args.classes + 1;
  parallel_range(parallel_for, args.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const char* student = row_of(args, args.student, r);
      const char* teacher = row_of(args, args.teacher, r);
      char* grad = static_cast<char*>(grad_student) + (student - static_cast<const char*>(args.student));
      if (!Call::keeps(args, r)) {
        std::memset(grad, 0, static_cast<size_t>(args.classes) * element);
        continue;
      }
      const auto part = [&](int64_t first, int64_t n, const DistillationGradient& gradient) {
        const size_t offset = static_cast<size_t>(first) * element;
        run(student + offset, teacher + offset, n, statistics[r], terms, gradient, grad + offset);
      };
      if (!terms.label) {
        part(0, args.classes, others);
        continue;
      }
      const int64_t y = args.target[r];  // before, at and after the target: grad may lie over student
      part(0, y, others);
      part(y, 1, at_target);
      part(y + 1, args.classes - y - 1, others);
    }
  });
  return status;
}

}  // namespace kdq
