"""Contenders for the distillation loss: forward and backward together, as a training step calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kdq_kernels as kk
from kdq.bench.case import Case, Contender
from kdq.bench.compiled import compiled
from kdq.bench.limits import copying
from kdq.bench.target import Target

TEMPERATURE, ALPHA = 4.0, 0.9
SHAPES = [(8192, 1000), (512, 32000)]
GPU_SHAPES = [*SHAPES, (8192, 32000), (2048, 128256)]
QUICK_SHAPES = [(16, 100)]
CHUNK = 256  # rows


def composed(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Hinton's loss from torch's own ops."""
    log_q = F.log_softmax(student / TEMPERATURE, -1)
    log_p = F.log_softmax(teacher / TEMPERATURE, -1)
    soft = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * F.cross_entropy(student, labels)


def fused(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return kk.distillation_loss(student, teacher, labels, temperature=TEMPERATURE, alpha=ALPHA)


def gradient(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, labels: Tensor
) -> Callable[[], Tensor]:
    """Forward and backward; returns the student's gradient."""

    def run() -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(loss(student, teacher, labels), student)[0]

    return run


def chunked_gradient(student: Tensor, teacher: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The composed loss's gradient, some rows at a time: as little memory as may be."""
    parts = []
    with torch.inference_mode(False):
        for s, t, y in zip(student.detach().split(CHUNK), teacher.split(CHUNK), labels.split(CHUNK), strict=True):
            part = gradient(composed, s.to(dtype).requires_grad_(), t.to(dtype), y)()
            parts.append(part.mul_(len(s) / len(student)))
        return torch.cat(parts)


def distillation_loss_cases(target: Target) -> Iterator[Case]:
    """float32 logits [rows, classes]. Bytes: both logits read, the gradient written."""
    generator = target.generator(6)
    for rows, classes in QUICK_SHAPES if target.quick else GPU_SHAPES if target.gpu else SHAPES:
        with torch.inference_mode(False):
            student, teacher = (
                3 * torch.randn(rows, classes, generator=generator, device=target.device) for _ in range(2)
            )
            student.requires_grad_()
            labels = torch.randint(classes, (rows,), generator=generator, device=target.device)
            reference = chunked_gradient(student, teacher, labels, torch.float64)
            contenders = [
                Contender("kdq distillation_loss", gradient(fused, student, teacher, labels), "ours", 1e-5),
                Contender("torch eager", gradient(composed, student, teacher, labels), "peer", 1e-5),
            ]
            if target.gpu:
                chunked = partial(chunked_gradient, student, teacher, labels, torch.float32)
                contenders.append(Contender("torch eager, chunked", chunked, "peer", 1e-5))
            if not target.quick:
                run = gradient(compiled(composed), student, teacher, labels)
                contenders.append(Contender("torch.compile", run, "peer", 1e-5))
        limits = [copying(3.0 * 4 * rows * classes)]
        yield Case("distillation_loss", f"{rows}x{classes}", limits, reference, contenders)
