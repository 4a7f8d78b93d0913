// The distillation loss for GPUs against the reference.
#include "cuda/distillation.h"

#include <utility>

#include "support.h"

namespace kdq::test {
namespace {

struct Case {
  int64_t rows;
  int64_t classes;
  float temperature;
  float alpha;
};

std::string name(const Case& c) {
  return std::to_string(c.rows) + " x " + std::to_string(c.classes) + ", T = " + std::to_string(c.temperature) +
         ", alpha = " + std::to_string(c.alpha);
}

template <class T>
struct Data {
  std::vector<T> student;
  std::vector<T> teacher;
  std::vector<int64_t> target;

  explicit Data(const Case& c) {
    const auto n = static_cast<size_t>(c.rows * c.classes);
    std::vector<float> s = normals(n, 3.0F);
    std::vector<float> t = normals(n, 3.0F);
    if (c.classes > 2) s[1] = t[1] = -INFINITY;  // a class that is ruled out
    student = narrowed<T>(s);
    teacher = narrowed<T>(t);
    for (int64_t r = 0; r < c.rows; ++r) target.push_back(r == 1 ? kIgnoredTarget : (r * 7 + 2) % c.classes);
  }

  DistillationLoss args(const Case& c) const {
    DistillationLoss args;
    args.dtype = dtype_of<T>();
    args.student = student.data();
    args.teacher = teacher.data();
    args.target = target.data();
    args.rows = c.rows;
    args.classes = c.classes;
    args.temperature = c.temperature;
    args.alpha = c.alpha;
    return args;
  }
};

// What a run on the emulator gives. in_place: the gradient over the student.
template <class T>
struct Result {
  float loss = 0.0F;
  float kept = 0.0F;
  std::vector<T> gradient;

  Result(DistillationLoss args, const Data<T>& data, const Setting& setting, bool in_place) {
    const auto rows = static_cast<size_t>(args.rows);
    Buffer<T> student(data.student, setting.place);
    Buffer<T> teacher(data.teacher, setting.place);
    Buffer<T> grad(data.student.size(), setting.place);
    Buffer<DistillationRow> statistics(rows, setting.place);
    Buffer<double> losses(rows, setting.place);
    Buffer<int64_t> target(data.target, setting.place);
    Buffer<float> scalars({0.0F, 0.0F, 1.5F}, setting.place);  // loss, kept, gradient of the loss
    const Launcher launcher(setting.descending);
    args.student = student.data();
    args.teacher = teacher.data();
    args.target = target.data();
    float* scalar = scalars.data();
    require(cuda::launch_distillation_loss(launcher, args, statistics.data(), losses.data(), scalar, scalar + 1));
    loss = scalar[0];
    kept = std::exchange(scalar[1], -1.0F);
    require(cuda::launch_distillation_kept(launcher, args.target, args.rows, scalar + 1));
    CHECK(scalar[1] == kept, "counted again: %g", static_cast<double>(scalar[1]));
    Buffer<T>& out = in_place ? student : grad;
    run_watched(out, [&] {
      return cuda::launch_distillation_loss_backward(launcher, args, statistics.data(), scalar + 1, scalar + 2,
                                                     out.data());
    });
    gradient = out.values();
  }
};

template <class T>
void test_loss(const Case& c, const Setting& setting) {
  const Data<T> data(c);
  const DistillationLoss args = data.args(c);
  std::vector<DistillationRow> statistics(static_cast<size_t>(c.rows));
  float loss = 0.0F;
  std::vector<T> gradient(data.student.size());
  require(distillation_loss(args, statistics.data(), &loss, serial_executor()));
  require(distillation_loss_backward(args, statistics.data(), 1.5F, gradient.data(), serial_executor()));
  for (bool in_place : {false, true}) {
    const Result<T> got(args, data, setting, in_place);
    CHECK(std::fabs(got.loss - loss) <= 2e-6F * (1.0F + std::fabs(loss)), "%s: %g, expected %g", name(c).c_str(),
          static_cast<double>(got.loss), static_cast<double>(loss));
    CHECK(got.kept == static_cast<float>(c.rows - (c.rows > 1 ? 1 : 0)), "%g", static_cast<double>(got.kept));
    const auto step = static_cast<float>(step_of<T>(2e-6));
    for (size_t i = 0; i < gradient.size(); ++i) {
      const float a = reference::load(&got.gradient[i]);
      const float b = reference::load(&gradient[i]);
      CHECK(std::fabs(a - b) <= step * std::fabs(b) + 1e-7F, "%s at %zu: %g, expected %g", name(c).c_str(), i,
            static_cast<double>(a), static_cast<double>(b));
    }
  }
}

void test_equal_logits_have_no_gradient() {
  const Case c = {3, 1001, 3.0F, 1.0F};
  Data<float> data(c);
  data.teacher = data.student;
  const Result<float> got(data.args(c), data, kSettings[0], false);
  CHECK(got.loss == 0.0F, "%g", static_cast<double>(got.loss));
  for (float g : got.gradient) CHECK(g == 0.0F, "%g", static_cast<double>(g));
}

void test_wrong_and_ignored_targets() {
  const Case c = {2, 10, 2.0F, 0.5F};
  Data<float> data(c);
  data.target = {10, kIgnoredTarget};
  const Result<float> wrong(data.args(c), data, kSettings[0], false);
  CHECK(std::isnan(wrong.loss) && std::isnan(wrong.gradient[0]) && wrong.gradient[10] == 0.0F, "a wrong class");
  data.target = {kIgnoredTarget, kIgnoredTarget};
  const Result<float> none(data.args(c), data, kSettings[0], false);
  CHECK(none.loss == 0.0F && none.kept == 0.0F && none.gradient[0] == 0.0F, "no row is kept");
}

void test_refusals() {
  const Case c = {2, 10, 2.0F, 0.5F};
  const Data<float> data(c);
  const auto refused = [&](DistillationLoss args) {
    DistillationRow rows[2];
    double losses[2];
    float loss = 0.0F;
    float kept = 0.0F;
    return !cuda::launch_distillation_loss(Launcher(false), args, rows, losses, &loss, &kept).ok();
  };
  DistillationLoss args = data.args(c);
  args.temperature = 0.0F;
  CHECK(refused(args), "temperature 0");
  args = data.args(c);
  args.target = nullptr;
  CHECK(refused(args), "no labels at alpha 0.5");
  args = data.args(c);
  args.teacher = nullptr;
  CHECK(refused(args), "no teacher");
}

void run_all() {
  test_refusals();
  test_equal_logits_have_no_gradient();
  test_wrong_and_ignored_targets();
  for (const Setting& setting : kSettings) {
    for (const Case& c : {Case{4, 10, 2.0F, 0.5F}, Case{3, 1001, 4.0F, 1.0F}, Case{3, 4096, 1.0F, 0.3F},
                          Case{2, 37, 1.0F, 0.0F}, Case{1, 1, 2.0F, 0.5F}}) {
      for_each_dtype([&](auto element) { test_loss<decltype(element)>(c, setting); });
    }
  }
}

}  // namespace
}  // namespace kdq::test

int main() { return kdq::test::run_tests(kdq::test::run_all); }
