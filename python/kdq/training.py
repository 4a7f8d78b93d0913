"""The loop inside `Distiller.fit`: epochs over a loader, and the optimizer's steps with accumulation and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdq import distributed
from kdq.observe import device_of
from kdq.teacher_cache import CachedTeacher

if TYPE_CHECKING:
    from kdq.distill import Distiller


@dataclass
class Loop:
    """Epochs of a distiller over a loader, which are the part `span` of its whole training.

    Args:
        optimizer_for: gives the optimizer once the first loss has shown what there is to train.
        accumulate: a step is taken every so many batches, on the mean of their gradients, and at the end of an epoch.

    Attributes:
        batches: of an epoch, once that is known.
        steps: that the optimizer took.
    """

    distiller: Distiller
    loader: Iterable[Any]
    epochs: int
    optimizer_for: Callable[[Tensor], Optimizer]
    scheduler: LRScheduler | None = None
    clip_grad_norm: float | None = None
    accumulate: int = 1
    span: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_count("accumulate", self.accumulate)
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm: expected a positive number, got {self.clip_grad_norm!r}")
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"span: expected a part of 0 to 1, got {self.span}")
        self.batches = len(self.loader) if isinstance(self.loader, Sized) else None
        self.first_epoch: int | None = None
        self.optimizer: Optimizer | None = None
        self.pending = 0  # batches whose gradients wait for a step
        self.steps = 0

    def epoch(self, epoch: int, advance: Callable[[float], None]) -> float:
        """Trains on all batches once; returns the mean loss. `advance` is told each.

        Raises:
            ValueError: the loader gives nothing, or another number of batches than in the first epoch or on other
                ranks.
            RuntimeError: a loss is not finite.
        """
        losses: list[float] = []
        device = device_of(self.distiller.student)
        distributed.start_epoch(self.loader, epoch)
        with _watched(self.distiller.teacher, repeats=epoch > 0 or self.span[0] > 0):
            for batch in distributed.batches_in_step(self.loader, device):
                self.distiller.progress = self._progress(epoch, len(losses))
                loss = self.distiller.loss(batch)
                if self.optimizer is None:
                    self.optimizer = self.optimizer_for(loss)
                    self.optimizer.zero_grad()
                losses.append(float(distributed.gather_numbers([float(loss.detach())], device).mean()))
                if not math.isfinite(losses[-1]):
                    where = f"step {len(losses)}" if self.epochs == 1 else f"epoch {epoch + 1}, step {len(losses)}"
                    raise RuntimeError(f"the loss is {losses[-1]} at {where}: lower the learning rate, check the data")
                loss.backward()
                self.pending += 1
                if self.pending == self.accumulate:
                    self._step(self.optimizer)
                advance(losses[-1])
        if not losses or self.optimizer is None:
            raise ValueError(f"loader: it gave no batch in epoch {epoch + 1} (an iterator can be used only once)")
        if self.pending:
            self._step(self.optimizer)
        if self.first_epoch is None:
            self.batches = self.first_epoch = len(losses)
        if len(losses) != self.first_epoch:
            raise ValueError(
                f"loader: expected {self.first_epoch} batches as in the first epoch, got {len(losses)} in epoch "
                f"{epoch + 1}"
            )
        return sum(losses) / len(losses)

    def _step(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.pending > 1:
            for parameter in parameters:
                parameter.grad.div_(self.pending)
        if self.clip_grad_norm is not None:
            distributed.clip_gradients_(parameters, self.clip_grad_norm)
        optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        optimizer.zero_grad()
        # Where a user's autocast is around all of it, the rounded weights of before would be used for ever.
        torch.clear_autocast_cache()
        self.pending = 0
        self.steps += 1

    def _progress(self, epoch: int, batch: int) -> float:
        within = min(batch / self.batches, 1.0) if self.batches else 0.0
        start, end = self.span
        return start + (end - start) * (epoch + within) / self.epochs


@contextmanager
def _watched(teacher: nn.Module, repeats: bool) -> Iterator[None]:
    """Lets every `CachedTeacher` in the teacher judge an epoch that repeats another."""
    caches = [module for module in teacher.modules() if isinstance(module, CachedTeacher)]
    before = [(cache.hits, cache.misses) for cache in caches]
    yield
    for cache, (hits, misses) in zip(caches, before, strict=True):
        if repeats:
            cache.judge(cache.hits - hits, cache.misses - misses)


def check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")


@contextmanager
def progress_bar(progress: bool | Progress, total: int | None) -> Iterator[Callable[[float], None]]:
    """A function that advances a bar and shows the loss; a Progress of the caller's stays, without our task. A bar of
    our own is drawn by rank 0 only."""
    bar = progress if isinstance(progress, Progress) else Progress(disable=not (progress and distributed.is_main()))
    task = bar.add_task("distil", total=total)
    if bar is not progress:
        bar.start()
    try:
        yield lambda loss: bar.update(task, advance=1, description=f"distil, loss {loss:.4f}")
    finally:
        if bar is progress:
            bar.remove_task(task)
        else:
            bar.stop()
