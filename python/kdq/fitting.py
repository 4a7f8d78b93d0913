"""The body of `Distiller.fit`: epochs with validation, checkpoints and an early stop, of a training whose arguments fit
together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdq import distributed, ranks
from kdq.averaging import WeightAverage
from kdq.observe import check_repeatable, training
from kdq.training import Log, Loop, check_count, check_optimizer, progress_bar, settings_of, taken_up
from kdq.validation import BestWeights, Validation, validate

if TYPE_CHECKING:
    from kdq.distill import Distiller


@dataclass(frozen=True)
class History:
    """What `Distiller.fit` did.

    Attributes:
        losses: the mean loss of each epoch.
        steps: of the optimizer.
        seconds: that the call took.
        validation: what each epoch's validation found, if there was one.
        best_epoch: index of the epoch whose weights were put back; None without `patience`.
    """

    losses: list[float]
    steps: int
    seconds: float
    validation: list[Validation] = field(default_factory=list)
    best_epoch: int | None = None


def fit(
    distiller: Distiller,
    loader: Iterable[Any],
    epochs: int,
    optimizer: Optimizer | None,
    lr: float,
    *,
    scheduler: LRScheduler | None,
    validation: Iterable[Any] | None,
    patience: int | None,
    clip_grad_norm: float | None,
    accumulate: int,
    span: tuple[float, float],
    ema: float | None,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int | None,
    log: Log | None,
    progress: bool | Progress,
) -> History:
    """Arguments and errors as `Distiller.fit` says."""
    check_together(optimizer, scheduler, validation, patience, checkpoint, checkpoint_every)
    if validation is not None and epochs > 1:
        check_repeatable(validation, f"{epochs} epochs need all batches each", "validation")
    start = time.perf_counter()
    student = distributed.unwrapped(distiller.student)

    def optimizer_for(loss: Tensor | None) -> Optimizer:
        return checked_optimizer(distiller, optimizer, loss, lr)

    average = None if ema is None else WeightAverage(student, ema)
    loop = Loop(
        distiller, loader, epochs, optimizer_for, scheduler, clip_grad_norm, accumulate, span, average=average, log=log
    )
    best = BestWeights(student, patience)
    saved = None
    if checkpoint is not None:
        how = f"Adam, lr={float(lr)}" if optimizer is None else settings_of(optimizer)
        with distributed.scope_of(distiller.student):
            saved = taken_up(checkpoint, checkpoint_every, loop, best, validation, how)
    warned = False
    trained = (distiller.student, distiller.teacher) if distiller.train_teacher else (distiller.student,)
    scope = distributed.scope_of(distiller.student)
    with scope, training(*trained), progress_bar(progress, *loop.total_and_done()) as advance:
        while len(loop.losses) < epochs and not best.is_enough():
            loop.epoch(advance)
            if validation is not None:
                with nullcontext() if average is None else average.in_place():
                    ranks.broadcast_(student.buffers())
                    best.see(validate(distiller.student, distiller.teacher, validation))
                warned = warned or best.found[-1].warn_of_worse_teacher(stacklevel=4)
                if log is not None:
                    log(loop.steps, best.found[-1].values())
            if saved is not None:
                saved.save()
        if patience is not None:
            best.put_back()
        elif average is not None:
            average.put_in()
        ranks.broadcast_(student.buffers())
    distiller.progress = span[1]
    return History(loop.losses, loop.steps, time.perf_counter() - start, best.found, best.epoch)


def check_together(
    optimizer: Optimizer | None,
    scheduler: LRScheduler | None,
    validation: Iterable[Any] | None,
    patience: int | None,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int | None,
) -> None:
    """Raises ValueError where an argument lacks the one that it belongs to."""
    if scheduler is not None and optimizer is None:
        raise ValueError("scheduler: it needs the optimizer that it belongs to")
    if patience is not None:
        check_count("patience", patience)
        if validation is None:
            raise ValueError("patience: it needs validation, on which the best epoch shows")
    if checkpoint_every is not None:
        check_count("checkpoint_every", checkpoint_every)
        if checkpoint is None:
            raise ValueError("checkpoint_every: it needs checkpoint, the file to write")


def checked_optimizer(distiller: Distiller, optimizer: Optimizer | None, loss: Tensor | None, lr: float) -> Optimizer:
    """The optimizer to use, once the first loss (or a checkpoint: None) has shown what there is to train."""
    if loss is not None and not loss.requires_grad:
        raise ValueError(
            "student: nothing to train: the loss does not depend on any parameter that requires a gradient"
        )
    if distiller.train_teacher and not any(p.requires_grad for p in distiller.teacher.parameters()):
        raise ValueError("train_teacher: no parameter of the teacher requires a gradient")
    if optimizer is None:
        return torch.optim.Adam(distributed.parameter_groups(distiller.parameters()), lr=lr)
    distiller.reshard()
    check_optimizer(distiller, optimizer)
    return optimizer
