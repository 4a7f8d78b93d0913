"""How the studies train: every arm of a comparison sees the same batches in the same order, as often as the others."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdq.distill import Distiller
from kdq.losses import Loss, SoftTargets
from kdq.observe import evaluating
from kdq.reporting import accuracy, teacher_kl
from kdq.studies.tasks import Data, Task

LABELS = SoftTargets(alpha=0.0)
FLOAT_RATE, QAT_RATE = 2e-3, 1e-3


class Batches:
    """A loader over `steps` batches drawn ahead: whoever starts from one seed sees the same ones."""

    def __init__(self, x: Tensor, y: Tensor | None, batch: int, steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x, self.y, self.steps = x, y, steps
        self.batch = min(batch, len(x))
        whole = len(x) // self.batch * self.batch  # no batch is smaller: batch norm
        epochs = -(-steps * self.batch // whole)
        orders = [torch.randperm(len(x), generator=generator)[:whole] for _ in range(epochs)]
        self.rows = torch.cat(orders).view(-1, self.batch)[:steps]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for rows in self.rows:
            yield (self.x[rows],) if self.y is None else (self.x[rows], self.y[rows])


def train(student: nn.Module, teacher: nn.Module, losses: Sequence[Loss], loader: Batches, lr: float) -> None:
    """One pass over the loader."""
    fit(Distiller(teacher, student, losses), loader, lr)


def fit(distiller: Distiller, loader: Batches, lr: float) -> None:
    """One pass over the loader with Adam; the learning rate falls to zero (cosine)."""
    optimizer = torch.optim.Adam(list(distiller.parameters()), lr=lr, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
    distiller.fit(loader, 1, optimizer, scheduler=scheduler, progress=False)
    distiller.student.eval()


@dataclass(frozen=True)
class Pair:
    """One seed's data, its trained teacher and its float student, from which all arms start."""

    data: Data
    teacher: nn.Module
    student: nn.Module


def train_pair(task: Task, seed: int) -> Pair:
    """Teacher on all labels, student on its few."""
    torch.manual_seed(seed)
    data = task.split(seed)
    teacher, student = task.teacher(), task.student()
    for model, (x, y), epochs in (
        (teacher, data.many(), task.teacher_epochs),
        (student, data.few(), task.student_epochs),
    ):
        steps = epochs * max(1, len(x) // task.batch)
        train(model, model, [LABELS], Batches(x, y, task.batch, steps, seed), FLOAT_RATE)
    return Pair(data, teacher, student)


@dataclass(frozen=True)
class Score:
    """Of a model on the test data: accuracy in percent, KL to the teacher in nats."""

    accuracy: float
    teacher_kl: float


@torch.inference_mode()
def score(model: nn.Module, pair: Pair, teacher: nn.Module | None = None) -> Score:
    """teacher: another than the pair's."""
    against = pair.teacher if teacher is None else teacher
    with evaluating(model, against):
        logits, expected = model(pair.data.test_x), against(pair.data.test_x)
    return Score(100 * accuracy(logits, pair.data.test_y), teacher_kl(logits, expected))


def fresh(model: nn.Module) -> nn.Module:
    """A copy in training mode, to start an arm from."""
    return copy.deepcopy(model).train()
