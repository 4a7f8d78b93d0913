"""Contenders for the distillation loss: forward and backward together, as a training step calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import kdq_kernels as kk
from kdq.bench.case import Case, Contender
from kdq.bench.compiled import compiled
from kdq.bench.limits import copying

TEMPERATURE, ALPHA = 4.0, 0.9
SHAPES = [(8192, 1000), (512, 32000)]
QUICK_SHAPES = [(16, 100)]


def composed(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Hinton's loss from torch's own ops."""
    log_q = F.log_softmax(student / TEMPERATURE, -1)
    log_p = F.log_softmax(teacher / TEMPERATURE, -1)
    soft = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * F.cross_entropy(student, target)


def fused(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return kk.distillation_loss(student, teacher, target, temperature=TEMPERATURE, alpha=ALPHA)


def gradient(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, target: Tensor
) -> Callable[[], Tensor]:
    """Forward and backward; returns the student's gradient."""

    def run() -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(loss(student, teacher, target), student)[0]

    return run


def distillation_loss_cases(quick: bool) -> Iterator[Case]:
    """float32 logits [rows, classes]. Bytes: both logits read, the gradient written."""
    generator = torch.Generator().manual_seed(6)
    for rows, classes in QUICK_SHAPES if quick else SHAPES:
        with torch.inference_mode(False):
            student = (3 * torch.randn(rows, classes, generator=generator)).requires_grad_()
            teacher = 3 * torch.randn(rows, classes, generator=generator)
            target = torch.randint(classes, (rows,), generator=generator)
            exact = student.detach().double().requires_grad_()
            reference = gradient(composed, exact, teacher.double(), target)()
            contenders = [
                Contender("kdq distillation_loss", gradient(fused, student, teacher, target), "ours", 1e-5),
                Contender("torch eager", gradient(composed, student, teacher, target), "peer", 1e-5),
            ]
            if not quick:
                run = gradient(compiled(composed), student, teacher, target)
                contenders.append(Contender("torch.compile", run, "peer", 1e-5))
        limits = [copying(3.0 * 4 * rows * classes)]
        yield Case("distillation_loss", f"{rows}x{classes}", limits, reference, contenders)
