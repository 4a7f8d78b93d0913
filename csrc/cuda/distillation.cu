// The distillation loss on a GPU: the public functions.
#include "cuda/distillation.h"

#include "cuda/launch.h"

namespace kdq::cuda {

Status distillation_loss(const DistillationLoss& args, DistillationRow* statistics, double* row_losses, float* loss,
                         float* kept, Stream stream) {
  return launch_distillation_loss(StreamLauncher(stream), args, statistics, row_losses, loss, kept);
}

Status distillation_kept(const int64_t* target, int64_t rows, float* kept, Stream stream) {
  return launch_distillation_kept(StreamLauncher(stream), target, rows, kept);
}

Status distillation_loss_backward(const DistillationLoss& args, const DistillationRow* statistics, const float* kept,
                                  const float* grad_loss, void* grad_student, Stream stream) {
  return launch_distillation_loss_backward(StreamLauncher(stream), args, statistics, kept, grad_loss, grad_student);
}

}  // namespace kdq::cuda
