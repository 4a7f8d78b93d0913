"""The distillation loss: shape inference and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdq_kernels._torch_library.fakes import fake


@fake("distillation_loss")
def _(
    student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float, alpha: float
) -> tuple[Tensor, Tensor]:
    rows = student.shape[:-1].numel()
    return student.new_empty((), dtype=torch.float32), student.new_empty((rows, 5), dtype=torch.float32)


@fake("distillation_loss_backward")
def _(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    statistics: Tensor,
    temperature: float,
    alpha: float,
) -> Tensor:
    return student.new_empty(student.shape)


def _save_distillation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, target, ctx.temperature, ctx.alpha = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, target, output[1])


def _distillation_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """The student's gradient; the teacher is a constant."""
    if grad is None:
        return None, None, None, None, None
    student, teacher, target, statistics = ctx.saved_tensors
    grad_student = torch.ops.kdq.distillation_loss_backward(
        grad, student, teacher, target, statistics, ctx.temperature, ctx.alpha
    )
    return grad_student, None, None, None, None


torch.library.register_autograd("kdq::distillation_loss", _distillation_backward, setup_context=_save_distillation)
