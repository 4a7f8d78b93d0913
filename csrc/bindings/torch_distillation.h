// torch.ops.kdq: the distillation loss.
#pragma once

#include "kdq/distillation.h"
#include "torch_common.h"

namespace kdq::bindings {

constexpr int64_t kDistillationColumns = 5;  // what the forward pass keeps of a row

static_assert(sizeof(DistillationRow) == kDistillationColumns * sizeof(float), "statistics are [rows, 5] float32");

// Keeps the tensors alive that args points into.
struct DistillationCall {
  DistillationLoss args;
  Tensor student;
  Tensor teacher;
  OptionalTensor target;
};

template <class On>
DistillationCall parse_distillation(const On& on, const Tensor& student, const Tensor& teacher,
                                    const OptionalTensor& target, double temperature, double alpha) {
  DistillationCall c;
  c.args.dtype = float_dtype("student", student);
  c.args.rows = rows_of("student", student);
  c.student = expect(on, "student", student, student.scalar_type());
  c.teacher = expect(on, "teacher", teacher, student.scalar_type());
  Sizes sizes = sizes_of(student);
  if (sizes_of(teacher) != sizes) {
    invalid("teacher: expected the shape of student " + to_string(sizes) + ", got " + to_string(sizes_of(teacher)));
  }
  c.args.classes = sizes.back();
  sizes.pop_back();
  if (target) {
    c.target = expect(on, "target", *target, ScalarType::Long);
    if (sizes_of(*target) != sizes) {
      invalid("target: expected one class index a row, shape " + to_string(sizes) + ", got " +
              to_string(sizes_of(*target)));
    }
    c.args.target = data<int64_t>(*c.target);
  }
  c.args.student = c.student.const_data_ptr();
  c.args.teacher = c.teacher.const_data_ptr();
  c.args.temperature = static_cast<float>(temperature);
  c.args.alpha = static_cast<float>(alpha);
  return c;
}

template <class On>
std::tuple<Tensor, Tensor> distillation_loss_op(const Tensor& student, const Tensor& teacher,
                                                const OptionalTensor& target, double temperature, double alpha) {
  const On on("student", student);
  const DistillationCall c = parse_distillation(on, student, teacher, target, temperature, alpha);
  const Tensor loss = empty(on, {}, ScalarType::Float);
  const Tensor statistics = empty(on, {c.args.rows, kDistillationColumns}, ScalarType::Float);
  check(on.distillation_loss(c.args, static_cast<DistillationRow*>(statistics.mutable_data_ptr()),
                             mutable_data<float>(loss)));
  return {loss, statistics};
}

template <class On>
Tensor distillation_loss_backward_op(const Tensor& grad_loss_in, const Tensor& student, const Tensor& teacher,
                                     const OptionalTensor& target, const Tensor& statistics_in, double temperature,
                                     double alpha) {
  const On on("student", student);
  const DistillationCall c = parse_distillation(on, student, teacher, target, temperature, alpha);
  const Tensor grad_loss = expect(on, "grad_loss", grad_loss_in, ScalarType::Float, 0);
  const Tensor statistics = expect(on, "statistics", statistics_in, ScalarType::Float, 2);
  if (statistics.size(0) != c.args.rows || statistics.size(1) != kDistillationColumns) {
    invalid("statistics: expected shape " + to_string({c.args.rows, kDistillationColumns}) + ", got " +
            to_string(sizes_of(statistics)));
  }
  const Tensor grad = empty(on, sizes_of(c.student), c.student.scalar_type());
  check(on.distillation_loss_backward(c.args, static_cast<const DistillationRow*>(statistics.const_data_ptr()),
                                      data<float>(grad_loss), grad.mutable_data_ptr()));
  return grad;
}

template <class On>
void register_distillation(torch::stable::detail::StableLibrary& m) {
  m.impl("distillation_loss", Operator<&distillation_loss_op<On>>::run);
  m.impl("distillation_loss_backward", Operator<&distillation_loss_backward_op<On>>::run);
}

}  // namespace kdq::bindings
