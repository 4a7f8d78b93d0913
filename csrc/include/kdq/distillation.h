// distillation_loss: softmax, KL divergence and cross-entropy of logits in one pass, and its gradient in another.
//
//   loss = mean over rows of  alpha T^2 KL(softmax(teacher / T) || softmax(student / T))
//                           + (1 - alpha) cross_entropy(student, target)
//
// (Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015.) With shifted logits s' = s - max s and
// t' = t - max t, p = softmax(t' / T), and the sums Z_s = sum exp(s' / T), Z_t likewise, Z = sum exp(s'):
//
//   KL(p || q)    = sum p (t' - s') / T - log Z_t + log Z_s        classes with p = 0 count 0, whatever s says
//   cross_entropy = log Z - s'[target]
//   d loss / d s  = (alpha T (exp(s' / T) / Z_s - p) + (1 - alpha) (exp(s') / Z - onehot(target))) / rows
//
// Exponentials below e^-87.3, the smallest normal float32, count 0. Nothing of the size of the logits is stored but the
// gradient: the forward pass leaves five numbers a row.
#pragma once

#include "kdq/parallel.h"
#include "kdq/status.h"
#include "kdq/types.h"

namespace kdq {

// A target that takes its row out of the loss, as in torch.
constexpr int64_t kIgnoredTarget = -100;

// What the forward pass keeps of a row.
struct DistillationRow {
  float student_max;
  float teacher_max;
  float student_sum;  // Z_s
  float teacher_sum;  // Z_t
  float label_sum;    // Z
};

struct DistillationLoss {
  DType dtype = DType::kFloat32;
  const void* student = nullptr;    // [rows, classes] of dtype
  const void* teacher = nullptr;    // [rows, classes] of dtype
  const int64_t* target = nullptr;  // [rows], class indices or kIgnoredTarget; may be null if alpha is 1
  int64_t rows = 0;
  int64_t classes = 0;
  float temperature = 1.0F;  // positive, finite
  float alpha = 1.0F;        // share of the teacher, 0 to 1
};

// statistics: [rows], written. The mean is over the rows that are not ignored; without any, the loss is 0.
KDQ_API Status distillation_loss(const DistillationLoss& args, DistillationRow* statistics, float* loss,
                                 const ParallelFor& parallel_for);

// grad_loss: the gradient of the scalar loss. grad_student: [rows, classes] of dtype; may be args.student.
KDQ_API Status distillation_loss_backward(const DistillationLoss& args, const DistillationRow* statistics,
                                          float grad_loss, void* grad_student, const ParallelFor& parallel_for);

}  // namespace kdq
