// kdq_kernels._C: the distillation loss on NumPy arrays. See numpy.cpp.
#include "numpy_distillation.h"

#include <pybind11/stl.h>

#include <vector>

#include "kdq/distillation.h"
#include "numpy_common.h"

namespace kdq::bindings {
namespace {

// (loss, gradient in the dtype of student, or None).
py::tuple distillation_loss_array(const py::array& student_in, const py::array& teacher_in,
                                  const std::optional<py::array>& target_in, float temperature, float alpha,
                                  bool with_gradient) {
  DistillationLoss args;
  args.dtype = float_dtype("student", student_in);
  args.rows = rows_of("student", student_in);
  Sizes sizes = sizes_of(student_in);
  if (!teacher_in.dtype().equal(student_in.dtype()) || sizes_of(teacher_in) != sizes) {
    invalid("teacher: expected dtype and shape of student, " + dtype_name(student_in) + " " + to_string(sizes) +
            ", got " + dtype_name(teacher_in) + " " + to_string(sizes_of(teacher_in)));
  }
  args.classes = sizes.back();
  sizes.pop_back();
  const py::array student = dense(student_in);
  const py::array teacher = dense(teacher_in);
  py::array target;
  if (target_in) {
    target = expect<int64_t>("target", *target_in);
    if (sizes_of(*target_in) != sizes) {
      invalid("target: expected one class index a row, shape " + to_string(sizes) + ", got " +
              to_string(sizes_of(*target_in)));
    }
    args.target = const_data<int64_t>(target);
  }
  args.student = student.data();
  args.teacher = teacher.data();
  args.temperature = temperature;
  args.alpha = alpha;
  py::object grad = py::none();
  void* grad_data = nullptr;
  if (with_gradient) {
    py::array array = empty(student.dtype(), sizes_of(student));
    grad_data = array.mutable_data();
    grad = array;
  }
  float loss = 0.0F;
  run([&] {
    std::vector<DistillationRow> statistics(static_cast<size_t>(args.rows));
    Status status = distillation_loss(args, statistics.data(), &loss, default_executor());
    if (!status.ok() || grad_data == nullptr) return status;
    return distillation_loss_backward(args, statistics.data(), 1.0F, grad_data, default_executor());
  });
  return py::make_tuple(loss, grad);
}

}  // namespace

void bind_distillation(py::module_& m) {
  m.def("distillation_loss", &distillation_loss_array, py::arg("student"), py::arg("teacher"), py::arg("target"),
        py::arg("temperature"), py::arg("alpha"), py::arg("with_gradient"));
}

}  // namespace kdq::bindings
