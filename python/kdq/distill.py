"""Knowledge distillation: a teacher's outputs and inner features as training targets for a (quantized) student.

    prepare_qat_(student, LowBit(weight_bits=2, act_bits=4))
    distiller = Distiller(teacher, student, losses=[SoftTargets(T=4), Hint({"block2": "layer3"})])
    distiller.fit(loader, epochs=20)

The losses are small frozen objects that can also be called alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import kdq_kernels as kk
from kdq.observe import (
    Batch,
    captured_outputs,
    check_same_shape,
    device_of,
    evaluating,
    find_layer,
    parse_batch,
    rows_of,
)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SoftTargets:
    """`alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * cross_entropy(student, target)`.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015. T^2 keeps the gradient's size
    independent of T. The mean is over the rows; rows whose target is -100 are left out of both terms, and if that
    leaves none, the loss is 0. On the CPU in float32, bfloat16 and float16 it is one fused kernel
    (`kdq_kernels.distillation_loss`); otherwise it is composed of torch's own ops.

    Args:
        T: temperature, above 0.
        alpha: share of the teacher, 0 to 1. Below 1 the batches need targets.
    """

    T: float = 4.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not (self.T > 0 and math.isfinite(self.T)):
            raise ValueError(f"T: expected a positive finite temperature, got {self.T!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {self.alpha!r}")

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of logits `[..., C]`, with class indices `[...]` as target: a scalar, in float32 or the student's
        float64.

        Raises:
            ValueError: the shapes differ, the target is no class index a row, or it is missing while alpha is below 1.
        """
        check_same_shape(student, teacher)
        if target is None and self.alpha < 1:
            raise ValueError(f"target: alpha={self.alpha} mixes in the labels, but the batch has none; use alpha=1")
        if student.device.type == "cpu" and student.dtype in KERNEL_DTYPES and teacher.device == student.device:
            return self._fused(student, teacher, target)
        rows, labels, kept = rows_of(student, target)
        if not bool(kept.any()):
            return rows[kept].sum()  # 0, and backward() works: its gradient is 0 too
        wide = torch.promote_types(student.dtype, torch.float32)
        rows = rows[kept].to(wide)
        loss = rows.new_zeros(())
        if self.alpha > 0:
            soft = teacher.detach().reshape(-1, teacher.shape[-1])[kept].to(wide)
            loss = self.alpha * self.T**2 * mean_kl(soft / self.T, rows / self.T)
        if labels is not None and self.alpha < 1:
            loss = loss + (1 - self.alpha) * F.cross_entropy(rows, labels[kept])
        return loss

    def _fused(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        """The same from `kdq_kernels.distillation_loss`, which takes both logits in one dtype."""
        if teacher.dtype != student.dtype:
            student, teacher = student.float(), teacher.float()
        if target is not None and not (target.is_floating_point() or target.is_complex()):
            target = target.long()
        return kk.distillation_loss(student, teacher.detach(), target, temperature=self.T, alpha=self.alpha)


def mean_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the rows of `KL(softmax(teacher) || softmax(student))`, logits `[rows, C]`, in nats.

    Classes that the teacher rules out (logit -inf) count 0, whatever the student says; F.kl_div gives NaN there.
    """
    log_p, log_q = F.log_softmax(teacher, -1), F.log_softmax(student, -1)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).mean()


@dataclass(frozen=True)
class Hint:
    """Mean squared distance between the outputs of named student layers and teacher layers, summed over the pairs.

    Romero et al.: FitNets: Hints for Thin Deep Nets, 2015. Where the widths differ, a `Distiller` learns a linear
    regressor from the student's feature to the teacher's.

    Args:
        layers: student layer name -> teacher layer name, as in `named_modules()`.
        weight: factor of the loss.
    """

    layers: Mapping[str, str]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise ValueError(f'layers: expected {{"student layer": "teacher layer", ...}}, got {self.layers!r}')
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight: expected a finite number, at least 0, got {self.weight!r}")

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The loss of features by layer name; the shapes of each pair must be equal (or adapted before).

        Raises:
            ValueError: they are not.
        """
        total: Tensor | None = None
        for ours, theirs in self.layers.items():
            if student[ours].shape != teacher[theirs].shape:
                raise ValueError(
                    f"Hint {ours!r} -> {theirs!r}: expected features of one shape, "
                    f"got {list(student[ours].shape)} and {list(teacher[theirs].shape)}"
                )
            distance = F.mse_loss(student[ours], teacher[theirs].detach().to(student[ours].dtype))
            total = distance if total is None else total + distance
        assert total is not None  # a Hint has at least one pair
        return self.weight * total


class Regressor(nn.Module):
    """A linear map along one axis (on channels, axis 1, it is a 1x1 convolution): FitNets' regressor."""

    def __init__(self, in_width: int, out_width: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.linear = nn.Linear(in_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.movedim(self.axis, -1))
        return y.movedim(-1, self.axis)

    @classmethod
    def between(cls, student: Tensor, teacher: Tensor, pair: str) -> nn.Module:
        """What maps the student's feature to the shape of the teacher's: nothing, if the shapes are equal.

        Raises:
            ValueError: the shapes differ in more than the channels (axis 1) or the features (last axis).
        """
        if student.shape == teacher.shape:
            return nn.Identity()
        axes = [i for i, (s, t) in enumerate(zip(student.shape, teacher.shape, strict=False)) if s != t]
        if student.dim() != teacher.dim() or len(axes) != 1 or axes[0] not in (1, student.dim() - 1):
            raise ValueError(
                f"Hint {pair}: expected features that differ only in axis 1 or the last axis, "
                f"got {list(student.shape)} and {list(teacher.shape)}"
            )
        axis = axes[0]
        return cls(student.shape[axis], teacher.shape[axis], axis).to(student.device, student.dtype)


# Beside Hint, any function of (student logits, teacher logits, target) is a loss.
LogitLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Loss: TypeAlias = Hint | LogitLoss


@dataclass(frozen=True)
class History:
    """What `Distiller.fit` did: the mean loss of each epoch, the number of steps and the time they took."""

    losses: list[float]
    steps: int
    seconds: float


class Distiller:
    """Trains a student on a teacher.

    The teacher runs in eval mode and without gradients and is never changed; it is no part of the student. Regressors
    of
    hints belong to the distiller: they exist from the first batch on and are trained with the student.

    Args:
        teacher, student: models whose outputs are logits (or have `.logits`) of one shape.
        losses: their sum is the loss.

    Raises:
        ValueError: a hint names a layer that does not exist, or there is no loss.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, losses: Sequence[Loss]) -> None:
        if not losses:
            raise ValueError("losses: expected at least one, for example [SoftTargets(T=4)]")
        self.teacher = teacher
        self.student = student
        self.losses = list(losses)
        self.hints = [loss for loss in self.losses if isinstance(loss, Hint)]
        self.pairs = [pair for hint in self.hints for pair in hint.layers.items()]
        self.regressors: dict[tuple[str, str], nn.Module] = {}
        for ours, theirs in self.pairs:
            find_layer(student, ours, "student")
            find_layer(teacher, theirs, "teacher")

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that trains: the student, the regressors of the hints, and losses that are modules.

        Raises:
            RuntimeError: there are hints, and no batch has shown yet how wide their features are.
        """
        if len(self.regressors) < len(set(self.pairs)):
            raise RuntimeError(
                "the hints' regressors take their widths from a batch: call distiller.prepare(batch) first"
            )
        yield from (p for p in self.student.parameters() if p.requires_grad)
        yield from self.own_parameters()

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the regressors and losses."""
        for module in (*self.regressors.values(), *self.losses):
            if isinstance(module, nn.Module):
                yield from module.parameters()

    def prepare(self, batch: Any) -> None:
        """Makes the hints' regressors from the shapes that one batch shows. Nothing is trained, no statistics
        change."""
        with torch.no_grad(), evaluating(self.student):
            self.loss(batch)

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch (a tensor, `(x, target)` or a dict): a scalar to call `backward()` on.

        Raises:
            ValueError: teacher and student differ in the shape of their logits, or a hint's features cannot be matched.
            TypeError: the batch or an output is of an unknown kind.
        """
        parsed = parse_batch(batch, device_of(self.student))
        teacher, taught = self._ask_teacher(parsed)
        return self._compare(parsed, teacher, taught)[0]

    def _ask_teacher(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's logits, and the features that the hints want of it."""
        with (
            torch.no_grad(),
            evaluating(self.teacher),
            captured_outputs(self.teacher, [theirs for _, theirs in self.pairs], "teacher") as taught,
        ):
            return batch.logits(self.teacher, "teacher"), taught

    def _compare(self, batch: Batch, teacher: Tensor, taught: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Runs the student: the loss against the given logits and features, and the student's logits."""
        with captured_outputs(self.student, [ours for ours, _ in self.pairs], "student") as learned:
            student = batch.logits(self.student, "student")
        check_same_shape(student, teacher)
        self._add_regressors(learned, taught)
        terms = [
            loss(self._adapted(loss, learned), taught)
            if isinstance(loss, Hint)
            else loss(student, teacher, batch.target)
            for loss in self.losses
        ]
        return torch.stack([term.to(terms[0].dtype) for term in terms]).sum(), student

    def _add_regressors(self, learned: Mapping[str, Tensor], taught: Mapping[str, Tensor]) -> None:
        for ours, theirs in self.pairs:
            for role, name, features in (("student", ours, learned), ("teacher", theirs, taught)):
                if name not in features:
                    raise ValueError(f"{role} layer {name!r} did not run in the forward pass: it gives no hint")
            if (ours, theirs) not in self.regressors:
                pair = f"{ours!r} -> {theirs!r}"
                self.regressors[ours, theirs] = Regressor.between(learned[ours], taught[theirs], pair)

    def _adapted(self, hint: Hint, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {ours: self.regressors[ours, theirs](learned[ours]) for ours, theirs in hint.layers.items()}

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int,
        optimizer: Optimizer | None = None,
        lr: float = 1e-3,
        *,
        scheduler: LRScheduler | None = None,
        progress: bool | Progress = True,
    ) -> History:
        """Trains for some passes over the loader; the student is in training mode meanwhile.

        Args:
            optimizer: None: Adam with the learning rate `lr` on `parameters()`.
            scheduler: stepped after every optimizer step.
            progress: False: no bar; a rich Progress: a task is added to it.

        Raises:
            ValueError: the loader is empty, the student has nothing to train, or the optimizer lacks the regressors.
            RuntimeError: the loss is not finite; the step that would follow is not taken.
        """
        if epochs < 1:
            raise ValueError(f"epochs: expected at least 1, got {epochs}")
        if scheduler is not None and optimizer is None:
            raise ValueError("scheduler: it needs the optimizer that it belongs to")
        start = time.perf_counter()
        modes = {module: module.training for module in self.student.modules()}
        batches = len(loader) if isinstance(loader, Sized) else None
        losses: list[float] = []
        steps = 0
        bar = progress if isinstance(progress, Progress) else Progress(disable=not progress)
        with nullcontext() if bar is progress else bar:
            task = bar.add_task("distil", total=None if batches is None else epochs * batches)
            self.student.train()
            try:
                for epoch in range(epochs):
                    epoch_losses: list[float] = []
                    for batch in loader:
                        loss = self.loss(batch)
                        optimizer = self._checked(optimizer, loss, lr)
                        value = float(loss.detach())
                        if not math.isfinite(value):
                            where = f"epoch {epoch + 1}, step {len(epoch_losses) + 1}"
                            raise RuntimeError(
                                f"the loss is {value} at {where}: lower the learning rate, check the data"
                            )
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                        if scheduler is not None:
                            scheduler.step()
                        epoch_losses.append(value)
                        bar.update(task, advance=1, description=f"distil, loss {value:.4f}")
                    if not epoch_losses:
                        raise ValueError(
                            f"loader: it gave no batch in epoch {epoch + 1} (an iterator can be used only once)"
                        )
                    losses.append(sum(epoch_losses) / len(epoch_losses))
                    steps += len(epoch_losses)
            finally:
                for module, mode in modes.items():
                    module.training = mode
                if bar is progress:
                    bar.remove_task(task)
        return History(losses, steps, time.perf_counter() - start)

    def _checked(self, optimizer: Optimizer | None, loss: Tensor, lr: float) -> Optimizer:
        """The optimizer to use, once the first loss has shown what there is to train."""
        if not loss.requires_grad:
            raise ValueError(
                "student: nothing to train: the loss does not depend on any parameter that requires a gradient"
            )
        if optimizer is None:
            return torch.optim.Adam(self.parameters(), lr=lr)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in trained for p in self.own_parameters()):
            raise ValueError(
                "optimizer: it lacks the hints' regressors; call distiller.prepare(batch), then make it from "
                "distiller.parameters()"
            )
        return optimizer
