"""Losses on logits: `loss(student_logits, teacher_logits, target) -> scalar`.

Each is a frozen dataclass. Logits are `[..., C]`, targets class indices `[...]`; the mean is over the rows whose target
is not -100, and if that leaves none, the loss is 0 with a gradient of 0. The result is float32, or float64 if the
student's logits are. No gradient reaches the teacher's logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import kdq_kernels as kk
from kdq.observe import check_same_shape, rows_of

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SoftTargets:
    """`alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * cross_entropy(student, target)`.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015. T^2 keeps the gradient's size
    independent of T. In this form, on the CPU in float32, bfloat16 and float16, it is one fused kernel
    (`kdq_kernels.distillation_loss`); the other forms are composed of torch's own ops.

    Args:
        T: temperature, above 0.
        alpha: share of the teacher, 0 to 1. Below 1 the batches need targets.
        divergence: "forward" as above; "reverse": KL(student || teacher), which seeks the teacher's modes and is
            infinite where the teacher rules a class out (logit -inf); "js": Jensen-Shannon, the mean of both
            distributions' KL to their average.
        standardize: the teacher's term compares `(logits - mean) / std` of each row, which must be finite (Sun, Ren,
            Li, Wang, Cao: Logit Standardization in Knowledge Distillation, 2024): the student need not match the
            teacher's scale and shift. The labels' term keeps the logits as they are.
    """

    T: float = 4.0
    alpha: float = 1.0
    divergence: Literal["forward", "reverse", "js"] = "forward"
    standardize: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.T)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {self.alpha!r}")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")

    @property
    def needs_teacher(self) -> bool:
        """Whether a `Distiller` has to run the teacher for this loss."""
        return self.alpha > 0

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of logits `[..., C]`, with class indices `[...]` as target.

        Raises:
            ValueError: the shapes differ, the target is no class index a row, or it is missing while alpha is below 1.
        """
        check_same_shape(student, teacher)
        if target is None and self.alpha < 1:
            raise ValueError(f"target: alpha={self.alpha} mixes in the labels, but the batch has none; use alpha=1")
        if self.divergence == "forward" and not self.standardize and fits_kernel(student, teacher):
            return fused(student, teacher, target, self.T, self.alpha)
        rows, soft, labels = counted_rows(student, teacher, target)
        if not len(rows):
            return rows.sum()
        loss = rows.new_zeros(())
        if self.alpha > 0:
            ours, theirs = (standardized(rows), standardized(soft)) if self.standardize else (rows, soft)
            loss = self.alpha * self.T**2 * DIVERGENCES[self.divergence](theirs / self.T, ours / self.T)
        if labels is not None and self.alpha < 1:
            loss = loss + (1 - self.alpha) * F.cross_entropy(rows, labels)
        return loss


@dataclass(frozen=True)
class DecoupledKD:
    """`T^2 * (alpha * TCKD + beta * NCKD)`: the teacher's soft targets in two parts with a weight each.

    Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, 2022. TCKD is the KL between the probabilities of
    (target class, any other class), NCKD that between the distributions over the other classes alone. With
    `beta = 1 - p_teacher(target)` a row it would be SoftTargets; a constant beta keeps the knowledge about the other
    classes where the teacher is sure. The paper adds the labels: `[CrossEntropy(), DecoupledKD()]`.

    Args:
        T: temperature, above 0.
        alpha, beta: factors of the two parts, at least 0.
    """

    T: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0

    def __post_init__(self) -> None:
        check_temperature(self.T)
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a finite number, at least 0, got {value!r}")

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of logits `[..., C]`, at least 2 classes, with class indices `[...]` as target.

        Raises:
            ValueError: the shapes differ, there is one class, or the target is missing or no class index a row.
        """
        if target is None:
            raise ValueError("target: DecoupledKD needs the labels, but the batch has none")
        rows, soft, labels = counted_rows(student, teacher, target)
        assert labels is not None  # there is a target
        if rows.shape[1] < 2:
            raise ValueError("student: DecoupledKD needs at least 2 classes, got 1")
        if not len(rows):
            return rows.sum()
        ours, theirs = (self._parts(logits / self.T, labels) for logits in (rows, soft))
        target_part, other_part = (mean_kl(t, s) for t, s in zip(theirs, ours, strict=True))
        return self.T**2 * (self.alpha * target_part + self.beta * other_part)

    @staticmethod
    def _parts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of (target, any other) `[rows, 2]`, and of the others alone `[rows, C - 1]`."""
        is_target = F.one_hot(labels, logits.shape[1]).bool()
        others = logits[~is_target].reshape(len(logits), -1)
        return torch.stack([logits[is_target], others.logsumexp(1)], 1), others


@dataclass(frozen=True)
class LogitRegression:
    """Half the squared distance of the logits, summed over the classes, mean over the rows.

    Ba, Caruana: Do Deep Nets Really Need to be Deep?, 2014. It is the limit of SoftTargets at high temperature where
    the logits of each row have mean 0 (up to the factor 1 / C). The logits must be finite.
    """

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of logits `[..., C]`; a target only says which rows are left out.

        Raises:
            ValueError: the shapes differ, or the target is no class index a row.
        """
        rows, soft, _ = counted_rows(student, teacher, target)
        return (rows - soft).square().sum(1).mean() / 2 if len(rows) else rows.sum()


@dataclass(frozen=True)
class CrossEntropy:
    """The labels alone; the teacher is not asked.

    Args:
        label_smoothing: share of the target that is spread evenly over the classes, from 0 to below 1 (Szegedy et al.:
            Rethinking the Inception Architecture for Computer Vision, 2016).
    """

    label_smoothing: float = 0.0
    needs_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number from 0 to below 1, got {self.label_smoothing!r}")

    def __call__(self, student: Tensor, teacher: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """The loss of logits `[..., C]`, with class indices `[...]` as target.

        Raises:
            ValueError: the target is missing or no class index a row.
        """
        if target is None:
            raise ValueError("target: CrossEntropy needs the labels, but the batch has none")
        if self.label_smoothing == 0 and fits_kernel(student, student):
            return fused(student, student, target, 1.0, 0.0)
        rows, _, labels = counted_rows(student, student, target)
        if labels is None or not len(rows):
            return rows.sum()
        return F.cross_entropy(rows, labels, label_smoothing=self.label_smoothing)


def mean_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the rows of `KL(softmax(teacher) || softmax(student))`, logits `[rows, C]`, in nats.

    Classes that the teacher rules out (logit -inf) count 0, whatever the student says; F.kl_div gives NaN there.
    """
    return mean_kl_of_logs(F.log_softmax(teacher, -1), F.log_softmax(student, -1))


def mean_kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean over the rows of `KL(p || q)` of log-probabilities `[rows, C]`."""
    p = log_p.exp()
    # The difference is what is masked: its product's gradient would be NaN where both logs are -inf.
    return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(-1).mean()


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the rows of `KL(softmax(student) || softmax(teacher))`."""
    return mean_kl(student, teacher)


def jensen_shannon(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the rows of `(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2`, at most log 2."""
    # Finite also where both rule a class out: logaddexp(-inf, -inf) has no gradient.
    log_p, log_q = (F.log_softmax(logits, -1).clamp_min(-1e30) for logits in (teacher, student))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (mean_kl_of_logs(log_p, log_m) + mean_kl_of_logs(log_q, log_m)) / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": mean_kl,
    "reverse": reverse_kl,
    "js": jensen_shannon,
}


def standardized(rows: Tensor) -> Tensor:
    """Each row less its mean, over its standard deviation (of the population); rows of equal logits become 0."""
    return (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True, correction=0) + 1e-7)


def counted_rows(student: Tensor, teacher: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both logits as `[rows, C]` in the student's precision, at least float32, and the labels; without rows of -100.

    Raises:
        ValueError: the shapes differ, or the target is no class index a row.
    """
    check_same_shape(student, teacher)
    rows, labels, kept = rows_of(student, target)
    wide = torch.promote_types(student.dtype, torch.float32)
    soft = teacher.detach().reshape(rows.shape)
    return rows[kept].to(wide), soft[kept].to(wide), None if labels is None else labels[kept]


def fits_kernel(student: Tensor, teacher: Tensor) -> bool:
    """Whether `kdq_kernels.distillation_loss` takes these logits."""
    return student.device.type == "cpu" and student.dtype in KERNEL_DTYPES and teacher.device == student.device


def fused(student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float, alpha: float) -> Tensor:
    """`kdq_kernels.distillation_loss`, which takes both logits in one dtype."""
    if teacher.dtype != student.dtype:
        student, teacher = student.float(), teacher.float()
    if target is not None and not (target.is_floating_point() or target.is_complex()):
        target = target.long()
    return kk.distillation_loss(student, teacher.detach(), target, temperature=temperature, alpha=alpha)


def check_temperature(value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"T: expected a positive finite temperature, got {value!r}")
