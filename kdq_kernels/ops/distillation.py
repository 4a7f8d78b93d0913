"""The loss of a student against its teacher, in one pass over the logits."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.kdq


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float,
    alpha: float,
) -> Tensor:
    """`alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) cross_entropy(student, target)`.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015. One pass over the logits forward and one
    backward, in float32 inside; nothing of their size is stored but the gradient. Differentiable in student_logits,
    once; the teacher is a constant.

    Args:
        student_logits, teacher_logits: `[..., C]`, of one dtype. Classes that the teacher rules out (logit -inf) count
            0, whatever the student says.
        target: int64 class indices `[...]`; may be left out if alpha is 1. Rows with -100 are left out of both terms.
        temperature: T, positive.
        alpha: share of the teacher, 0 to 1.

    Returns:
        float32 0-d: the mean over the rows that are not left out, 0 if there are none.

    Raises:
        ValueError: a shape, dtype or value is wrong, a target is no class index, or it is missing.
    """
    return _ops.distillation_loss(student_logits, teacher_logits, target, temperature, alpha)[0]
