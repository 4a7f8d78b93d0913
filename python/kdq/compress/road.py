"""compress: calibrate, distil at every precision, choose under a budget, finetune, convert, report; in one call.

Every phase leaves its result in the run's folder. A run that is killed goes on from there when it is called again, and
ends with what the uninterrupted run would have given: each epoch draws its random numbers from a seed of its own.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from kdq.compress.evaluate import Evaluation
from kdq.compress.folder import RunFolder, fingerprint, fingerprint_of, write_atomically
from kdq.compress.repeatable import seeded
from kdq.compress.report import CompressionReport, Training
from kdq.configs import Config, Int8Dynamic, LowBit, config_to_json, normalize
from kdq.distill import Distiller, Loss, SoftTargets
from kdq.io import load, save
from kdq.observe import device_of, parse_batch
from kdq.quantize import convert_
from kdq.search import Budget, Plan, search_precision
from kdq.switch import keeping_precision, precisions, set_precision_
from kdq.switchable import SwitchableDistiller, prepare_switchable_

PRECISIONS: tuple[Config, ...] = (
    Int8Dynamic(),
    LowBit(weight_bits=4, act_bits=8),
    LowBit(weight_bits=2, act_bits=8),
    LowBit(weight_bits=1, act_bits=8),
)
PHASES = ("distil", "search", "finetune", "convert", "report")


@dataclass(frozen=True)
class Compressed:
    """What `compress` returns: the converted model in eval mode, the plan it follows, the report, and the folder with
    `model.safetensors`, `plan.json`, `report.json` and `report.html`."""

    model: nn.Module
    plan: Plan
    report: CompressionReport
    folder: Path


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    budget: Budget,
    teacher: nn.Module | None = None,
    validation: Iterable[Any] | None = None,
    folder: str | os.PathLike[str] = "compressed",
    precisions: Sequence[Config] = PRECISIONS,
    losses: Sequence[Loss] | None = None,
    epochs: int = 20,
    finetune_epochs: int = 10,
    lr: float = 1e-3,
    refine: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Compresses a trained float model to a budget: one low-bit student, distilled, on the integer and binary kernels.

    1. *distil*: a switchable student tries every precision under the teacher (`SwitchableDistiller`).
    2. *search*: an exact plan under the budget, by teacher-KL and by sizes and times measured here
       (`search_precision`).
    3. *finetune*: the plan is trained on.
    4. *convert* to the layers that run on the kernels.
    5. *report*: before and after, every other choice the student offers, errors by layer.

    Call it again with the same arguments and folder after an interruption, and it goes on where it was; with another
    budget, and the distilled student is used again. What the loader yields cannot be compared: use a new folder for
    new data.

    Args:
        model: trained, float; it is left as it is.
        loader: batches to train on, as for `Distiller`; gone through once an epoch, always as many batches. A
            DataLoader's own generator is seeded for each epoch; other sources of randomness than torch, NumPy and random
            are not repeated after an interruption.
        budget: what the converted model may cost.
        teacher: outputs logits of the model's shape. None: the model itself, which needs no labels.
        validation: batches to choose and to report on; None: the loader's. They are kept in memory.
        folder: of the run; made if missing.
        precisions: what the student tries and the plan may use.
        losses: None: soft targets at temperature 4, with a tenth for labels if there are any and a teacher is given.
        epochs, finetune_epochs: passes over the loader.
        lr: of Adam at the start of both; falls to zero (cosine over the epochs).
        refine: of `search_precision`.
        progress: whether to show bars.

    Raises:
        ValueError: the budget cannot be met (the message names the smallest reachable value), the loader is empty or
            changes its length, outputs do not match, or the folder belongs to something else.
        RuntimeError: a loss is not finite. The checkpoint of the epoch before is kept.
    """
    for name, count in (("epochs", epochs), ("finetune_epochs", finetune_epochs)):
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    source = loader if validation is None else validation
    held = list(source)
    if not held:
        raise ValueError(f"{'loader' if validation is None else 'validation'}: expected at least one batch, got none")
    labelled = parse_batch(held[0]).target is not None
    if losses is None:
        losses = [SoftTargets(T=4.0, alpha=0.9 if labelled and teacher is not None else 1.0)]
    road = _Road(
        model=copy.deepcopy(model).eval(),
        teacher=copy.deepcopy(model if teacher is None else teacher).eval(),
        loader=loader,
        held=held,
        budget=budget,
        folder=RunFolder(Path(folder)),
        precisions=[normalize(config) for config in precisions],
        losses=losses,
        epochs=epochs,
        finetune_epochs=finetune_epochs,
        lr=lr,
        refine=refine,
        seed=seed,
        progress=progress,
    )
    return road.run()


@dataclass
class _Road:
    """The arguments of `compress`, and the phases."""

    model: nn.Module
    teacher: nn.Module
    loader: Iterable[Any]
    held: list[Any]
    budget: Budget
    folder: RunFolder
    precisions: list[Config]
    losses: Sequence[Loss]
    epochs: int
    finetune_epochs: int
    lr: float
    refine: int
    seed: int
    progress: bool

    def run(self) -> Compressed:
        student = self.switchable()
        distilled = fingerprint(
            model=fingerprint_of(self.model),
            teacher=fingerprint_of(self.teacher),
            precisions=[config_to_json(config) for config in self.precisions],
            losses=[str(loss) for loss in self.losses],
            epochs=self.epochs,
            lr=self.lr,
            seed=self.seed,
        )
        distiller = SwitchableDistiller(self.teacher, student, self.losses, seed=self.seed)
        self.phase("distil", distilled, partial(self.train, "distil", distiller, self.epochs, distilled))
        self.restore("distil", student)

        searched = fingerprint(after=distilled, budget=asdict(self.budget), refine=self.refine)
        found = self.phase("search", searched, partial(self.search, student))
        plan = Plan.from_json(found["plan"])
        rounded = self.converted(student, plan)

        tuned = fingerprint(after=searched, epochs=self.finetune_epochs)
        set_precision_(student, plan)
        distiller = Distiller(self.teacher, student, self.losses)
        self.phase("finetune", tuned, partial(self.train, "finetune", distiller, self.finetune_epochs, tuned))
        choices = {config: self.converted(student, config) for config in self.choices(student)}
        self.restore("finetune", student)

        path = self.folder.path / "model.safetensors"
        self.phase("convert", tuned, partial(self.convert, student, plan, path))
        final = load(path, copy.deepcopy(self.model)).eval()
        report = self.phase("report", tuned, partial(self.report, final, plan, rounded, choices))
        return Compressed(final, plan, CompressionReport.from_json(report["report"]), self.folder.path)
