"""The loop inside `Distiller.fit`: epochs over a loader, and the optimizer's steps with accumulation and clipping.

Its state is all that a checkpoint needs to take it up again, between any two steps.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdq import distributed, ranks
from kdq.averaging import WeightAverage
from kdq.checkpoint import (
    Checkpoint,
    OfEachRank,
    RandomState,
    Stateful,
    description,
    load_optimizer_state,
    optimizer_state,
)
from kdq.layers.codebook_qat import CodebookQATLinear
from kdq.layers.qat import TrainingTwin
from kdq.observe import check_repeatable, device_of
from kdq.teacher_cache import CachedTeacher
from kdq.validation import BestWeights

if TYPE_CHECKING:
    from kdq.distill import Distiller

Log: TypeAlias = Callable[[int, dict[str, float]], object]


@dataclass
class Loop:
    """Epochs of a distiller over a loader, which are the part `span` of its whole training.

    Args:
        optimizer_for: gives the optimizer once the first loss (or a checkpoint: None) has shown what there is to train.
        accumulate: a step is taken every so many batches, on the mean of their gradients, and at the end of an epoch.
        average: takes the weights in after each step.
        log: is told the loss, the learning rate and the norm of the gradients, if they are clipped, after each step.

    Attributes:
        batches: of an epoch, once that is known.
        steps: that the optimizer took.
        losses: the mean loss of each whole epoch.
        within: the losses of the batches of the epoch under way.
        after_step: called when a step is done; the state may be saved then.
    """

    distiller: Distiller
    loader: Iterable[Any]
    epochs: int
    optimizer_for: Callable[[Tensor | None], Optimizer]
    scheduler: LRScheduler | None = None
    clip_grad_norm: float | None = None
    accumulate: int = 1
    span: tuple[float, float] = (0.0, 1.0)
    average: WeightAverage | None = None
    log: Log | None = None

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_count("accumulate", self.accumulate)
        if self.epochs > 1:
            check_repeatable(self.loader, f"{self.epochs} epochs need all batches each")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm: expected a positive number, got {self.clip_grad_norm!r}")
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"span: expected a part of 0 to 1, got {self.span}")
        self.batches = len(self.loader) if isinstance(self.loader, Sized) else None
        self.first_epoch: int | None = None
        self.optimizer: Optimizer | None = None
        self.pending = 0  # batches whose gradients wait for a step
        self.steps = 0
        self.losses: list[float] = []
        self.within: list[float] = []
        self.random = RandomState(self.loader, self.distiller)
        self.random_at_start: dict[str, Any] = {}  # of the epoch under way
        self.after_step: Callable[[], object] = lambda: None

    def begin(self, optimizer: Optimizer) -> None:
        """Takes the optimizer, and drops gradients of before."""
        self.optimizer = optimizer
        optimizer.zero_grad()

    def epoch(self, advance: Callable[[float], None]) -> None:
        """Trains on all batches once, or on those that are left. `advance` is told the loss of each.

        Raises:
            ValueError: the loader gives nothing, or another number of batches than in the first epoch or on other
                ranks.
            RuntimeError: a loss is not finite.
        """
        epoch = len(self.losses)
        with ExitStack() as watched:
            for cache in (m for m in self.distiller.teacher.modules() if isinstance(m, CachedTeacher)):
                watched.enter_context(cache.epoch(whole=not self.within, repeats=epoch > 0 or self.span[0] > 0))
            for batch in self._batches(epoch):
                self._learn(batch, epoch)
                advance(self.within[-1])
        if not self.within or self.optimizer is None:
            where = "" if self.epochs == 1 else f" in epoch {epoch + 1}"
            raise ValueError(f"loader: it gave no batch{where} (an iterator can be used only once)")
        if self.pending:
            self._step(self.optimizer)
        if self.first_epoch is None:
            self.batches = self.first_epoch = len(self.within)
        if len(self.within) != self.first_epoch:
            raise ValueError(
                f"loader: expected {self.first_epoch} batches as in the first epoch, got {len(self.within)} in epoch "
                f"{epoch + 1}"
            )
        self.losses.append(sum(self.within) / len(self.within))
        self.within = []

    def _batches(self, epoch: int) -> Iterator[Any]:
        """Those of an epoch. Where it was broken off, the loader draws as it did, and batches that were trained on are
        passed over; then the random numbers go on from where they were."""
        known = len(self.within)
        now = self.random.state_dict()
        if known:
            self.random.load_state_dict(self.random_at_start)
        else:
            self.random_at_start = now
        number = 0
        ranks.start_epoch(self.loader, epoch)
        device = device_of(self.distiller.student)
        for number, batch in enumerate(ranks.batches_in_step(self.loader, device), 1):
            if number > known:
                yield batch
            elif number == known:
                self.random.load_state_dict(now)
        if number < known:
            raise ValueError(f"loader: it gave {number} batches, but the checkpoint has {known} of this epoch")

    def _learn(self, batch: Any, epoch: int) -> None:
        self.distiller.progress = self._progress(epoch, len(self.within))
        loss = self.distiller.loss(batch)
        if self.optimizer is None:
            self.begin(self.optimizer_for(loss))
        assert self.optimizer is not None
        value = float(ranks.gather_numbers([float(loss.detach())], loss.device).mean())
        if not math.isfinite(value):
            step = f"step {len(self.within) + 1}"
            where = step if self.epochs == 1 else f"epoch {epoch + 1}, {step}"
            raise RuntimeError(f"the loss is {value} at {where}: lower the learning rate, check the data")
        self.within.append(value)
        loss.backward()
        self.pending += 1
        if self.pending == self.accumulate:
            self._step(self.optimizer)

    def _step(self, optimizer: Optimizer) -> None:
        told = {"loss": sum(self.within[-self.pending :]) / self.pending, "lr": float(optimizer.param_groups[0]["lr"])}
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.pending > 1:
            for parameter in parameters:
                parameter.grad.div_(self.pending)
        if self.clip_grad_norm is not None:
            told["grad_norm"] = distributed.clip_gradients_(parameters, self.clip_grad_norm)
        optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        optimizer.zero_grad()
        # Where a user's autocast is around all of it, the rounded weights of before would be used for ever.
        torch.clear_autocast_cache()
        if self.average is not None:
            self.average.update()
        self.pending = 0
        self.steps += 1
        if self.log is not None:
            self.log(self.steps, told)
        self.after_step()

    def state_dict(self) -> dict[str, Any]:
        """Between two steps; the models' weights and the random numbers to come are not part of it."""
        assert self.optimizer is not None, "no step was taken"
        return {
            "optimizer": optimizer_state(self.optimizer, self.distiller.names()),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "random_at_start": ranks.gather_objects(self.random_at_start) if self.within else [],
            **{name: getattr(self, name) for name in ("steps", "losses", "within", "first_epoch")},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """After `begin`."""
        assert self.optimizer is not None, "begin comes first"
        load_optimizer_state(self.optimizer, self.distiller.names(), state["optimizer"])
        for name, part in {"scheduler": self.scheduler, "average": self.average}.items():
            if part is not None:
                part.load_state_dict(state[name])
        if state["random_at_start"]:
            self.random_at_start = ranks.own_of(state["random_at_start"])
        for name in ("steps", "losses", "within", "first_epoch"):
            setattr(self, name, state[name])
        self.batches = self.batches if self.first_epoch is None else self.first_epoch

    def total_and_done(self) -> tuple[int | None, int]:
        """Batches: of all epochs, if that is known, and of those that were trained on."""
        done = len(self.losses) * (self.first_epoch or 0) + len(self.within)
        return (None if self.batches is None else self.epochs * self.batches), done

    def _progress(self, epoch: int, batch: int) -> float:
        within = min(batch / self.batches, 1.0) if self.batches else 0.0
        start, end = self.span
        return start + (end - start) * (epoch + within) / self.epochs


def taken_up(
    path: str | os.PathLike[str],
    every: int | None,
    loop: Loop,
    best: BestWeights,
    validation: Iterable[Any] | None,
    optimizer: str,
) -> Checkpoint:
    """The checkpoint of a fit, which goes on from it if it exists, and saves it after `every` so many steps.

    Raises:
        ValueError, RuntimeError: as `Checkpoint.load`.
    """
    distiller = loop.distiller
    about = {
        **{name: getattr(loop, name) for name in ("epochs", "batches", "accumulate", "clip_grad_norm")},
        "span": list(loop.span),
        "optimizer": optimizer,
        "scheduler": None if loop.scheduler is None else type(loop.scheduler).__name__,
        "ema": None if loop.average is None else loop.average.decay,
        "patience": best.patience,
        "losses": description(distiller.losses),
        "student": _digest(distributed.unwrapped(distiller.student)),
    }
    parts: dict[str, Stateful] = {"distiller": distiller, "loop": loop, "best": best}
    if distiller.train_teacher:
        parts["teacher"] = distiller.teacher
    # The last, as making adapters draws some.
    parts["random"] = OfEachRank(RandomState(loop.loader, validation, distiller))
    saved = Checkpoint(path, about, parts)
    if saved.exists():
        distiller.prepare_for(loop.loader)
        loop.begin(loop.optimizer_for(None))
        saved.load()
    if every is not None:
        loop.after_step = lambda: saved.save() if loop.steps % every == 0 else None
    return saved


def _digest(model: nn.Module) -> str:
    """Of its structure and precisions, not of its weights."""
    layers = [
        (name, distributed.class_name(module), vars(module).get("config") if isinstance(module, TrainingTwin) else None)
        for name, module in model.named_modules()
    ]
    return hashlib.sha256(description(layers).encode()).hexdigest()[:16]


def settings_of(optimizer: Optimizer) -> str:
    """Its class, and what its groups were made with: learning rates, before a scheduler changed them, and decays. Each
    counts once: of sharded models, `parameter_groups` makes two groups of one."""
    each = []
    for group in optimizer.param_groups:
        rate, decay = float(group.get("initial_lr", group["lr"])), group.get("weight_decay", 0)
        each.append(f"lr={rate}" + (f" weight_decay={float(decay)}" if decay else ""))
    return ", ".join([type(optimizer).__name__, *dict.fromkeys(each)])


def check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")


def check_optimizer(distiller: Distiller, optimizer: Optimizer) -> None:
    """Raises ValueError if the optimizer lacks adapters, learned scales, or the teacher that trains."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in trained for p in distiller.own_parameters()):
        raise ValueError(
            "optimizer: it lacks the adapters of the feature losses; call distiller.prepare(batch), then make it "
            "from distiller.parameters()"
        )
    if distiller.train_teacher and not any(id(p) in trained for p in distiller.teacher.parameters()):
        raise ValueError("optimizer: it lacks the teacher's parameters; make it from distiller.parameters()")
    check_scales_train(distiller.student, trained)


def check_scales_train(student: nn.Module, trained: Container[int]) -> None:
    """Raises ValueError if a training twin's weight (of a Codebook's, its bias) is among the parameters (by id) and its
    learned scales or centroids are not."""
    for name, module in student.named_modules():
        # A twin within a switchable layer has a weight only while it is in use.
        own, learned = ("bias", "centroids") if isinstance(module, CodebookQATLinear) else ("weight", "learned scales")
        if isinstance(module, TrainingTwin) and id(getattr(module, own, None)) in trained:
            scales = [p for p in module.parameters() if p.requires_grad and p is not getattr(module, "bias", None)]
            if any(id(p) not in trained for p in scales):
                raise ValueError(
                    f"optimizer: it has the {own} of {name!r}, but not all of its {learned}: make it after "
                    "prepare_qat_, or freeze them by requires_grad_(False)"
                )


@contextmanager
def progress_bar(progress: bool | Progress, total: int | None, completed: int = 0) -> Iterator[Callable[[float], None]]:
    """A function that advances a bar and shows the loss; a Progress of the caller's stays, without our task. A bar of
    our own is drawn by rank 0 only."""
    bar = progress if isinstance(progress, Progress) else Progress(disable=not (progress and ranks.is_main()))
    task = bar.add_task("distil", total=total, completed=completed)
    if bar is not progress:
        bar.start()
    try:
        yield lambda loss: bar.update(task, advance=1, description=f"distil, loss {loss:.4f}")
    finally:
        if bar is progress:
            bar.remove_task(task)
        else:
            bar.stop()
