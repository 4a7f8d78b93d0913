"""compress: calibrate, distil at every precision, choose under a budget, finetune, convert, report; in one call.

Every phase leaves its result in the run's folder. A run that is killed goes on from there when it is called again, and
ends with what the uninterrupted run would have given: each epoch draws its random numbers from a seed of its own.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import Optimizer

from kdq.checkpoint import description, write_atomically
from kdq.compression.evaluate import count_samples, describe_layers, evaluate
from kdq.compression.folder import RunFolder, fingerprint
from kdq.compression.repeatable import seeded
from kdq.compression.report import CompressionReport, Model, Training
from kdq.configs import Config, Int8Dynamic, LowBit, bits_of, config_to_json, normalize, short_name
from kdq.distill import Distiller, History
from kdq.io import load, save
from kdq.losses import Loss, SoftTargets
from kdq.observe import check_repeatable, evaluating, parse_batch
from kdq.quantize import prepare_switchable_, quantizable_layers, quantize_
from kdq.reporting import ROUNDS
from kdq.search import Budget, Plan, search_precision
from kdq.search.cost import OtherTimes
from kdq.switch import extract, float_copy, keeping_precision, precisions, set_precision_
from kdq.switchable_distill import SwitchableDistiller
from kdq.teacher_cache import CachedTeacher
from kdq.teacher_cache import fingerprint as fingerprint_of
from kdq.validation import validate

PRECISIONS: tuple[Config, ...] = (
    Int8Dynamic(),
    LowBit(weight_bits=4, act_bits=8),
    LowBit(weight_bits=2, act_bits=8),
    LowBit(weight_bits=1, act_bits=8),
)


@dataclass(frozen=True)
class Compressed:
    """What `compress` returns: the converted model in eval mode, the plan it follows, the report, and the folder with
    `model.safetensors`, `plan.json`, `report.json` and `report.html`."""

    model: nn.Module
    plan: Plan
    report: CompressionReport
    folder: Path

    def __str__(self) -> str:
        return str(self.report)


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    budget: Budget,
    teacher: nn.Module | None = None,
    validation: Iterable[Any] | None = None,
    folder: str | os.PathLike[str] = "compressed",
    candidates: Sequence[Config] = PRECISIONS,
    losses: Sequence[Loss] | None = None,
    epochs: int = 20,
    finetune_epochs: int = 10,
    lr: float = 1e-3,
    refine: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Compresses a trained float model to a budget: one low-bit student, distilled, on the integer and binary kernels.

        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        small = kdq.compress(model, loader, budget=kdq.Budget(size_bytes=size / 8), teacher=teacher)
        print(small.report)

    1. *distil*: a switchable student tries every precision under the teacher (`SwitchableDistiller`; each
       from the next wider one where a candidate has 1-bit weights, else all from the teacher).
    2. *search*: an exact plan under the budget, by teacher-KL and by sizes and times measured here
       (`search_precision`).
    3. *finetune*: the plan is trained on.
    4. *convert* to the layers that run on the kernels.
    5. *report*: before and after, every other choice the student offers, errors by layer before and after.

    Call it again with the same arguments and folder after an interruption, and it goes on where it was, from the last
    whole epoch. With another budget the distilled student is used again, and what follows from it replaced; with
    another model, teacher or way of training (a lower `lr`, after a loss that is not finite) all begins anew. Then what
    finished phases left is replaced; the checkpoint of one that did not end stays, and the arguments that it is of go
    on from it. What the loader and validation yield, and functions among
    the losses, are not compared: use a new folder where they change.

    Args:
        model: trained, float; it is left as it is. An nn.MultiheadAttention stays in float: call `open_attention_` on
            the model first, so that the plan has names of layers that it has.
        loader: batches to train on, as for `Distiller`; gone through once an epoch, always as many batches. A
            DataLoader's own generator is seeded for each epoch; other sources of randomness than torch, NumPy and
            random, and those in persistent workers, are not repeated after an interruption.
        budget: what the converted model may cost.
        teacher: outputs logits of the model's shape. None: the model itself, which needs no labels.
        validation: batches to choose and to report on; None: the loader's. They are kept in memory.
        folder: of the run; made if missing.
        candidates: the precisions that the student tries and the plan may use, two or more. The report's row "only
            rounded" has method "lsq" in the place of those of training.
        losses: None: soft targets at temperature 4; where a teacher is given and a batch has labels, a tenth of them.
        epochs, finetune_epochs: passes over the loader.
        lr: of Adam at the start of both; falls to zero (cosine over the epochs). Small perceptrons gain from 3e-3,
            which is too much for deep transformers.
        refine: of `search_precision`.
        progress: whether to show bars.

    Raises:
        ValueError: the budget cannot be met (the message names the smallest reachable value), the loader is empty, can
            be used only once or changes its length, outputs do not match, no layer can be quantized, or the folder
            belongs to something else.
        RuntimeError: a loss is not finite: the checkpoint of the epoch before is kept; or matplotlib is missing.
    """
    _check(model, candidates, epochs, finetune_epochs)
    check_repeatable(loader, "every epoch needs all batches")
    source = loader if validation is None else validation
    with seeded(seed, source):  # a resumed run is to see the same
        held = list(source)
    if not held:
        raise ValueError(f"{'loader' if validation is None else 'validation'}: expected at least one batch, got none")
    if teacher is not None:
        validate(model, teacher, held).warn_of_worse_teacher()
    if losses is None:
        losses = [SoftTargets(T=4.0) if teacher is None else TeacherAndLabels()]
    road = _Road(
        model=copy.deepcopy(model).eval(),
        teacher=teacher,
        loader=loader,
        held=held,
        budget=budget,
        folder=RunFolder(Path(folder)),
        precisions=[normalize(config) for config in candidates],
        losses=losses,
        epochs=epochs,
        finetune_epochs=finetune_epochs,
        lr=lr,
        refine=refine,
        seed=seed,
        progress=progress,
    )
    return road.run()


def _check(model: nn.Module, candidates: Sequence[Config], epochs: int, finetune_epochs: int) -> None:
    """What would show only after hours, or with a name that is not the caller's."""
    for name, count in (("epochs", epochs), ("finetune_epochs", finetune_epochs)):
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    if len({normalize(config) for config in candidates}) < max(2, len(candidates)):
        raise ValueError(f"candidates: expected at least two different ones, got {list(candidates)}")
    if not quantizable_layers(model):
        raise ValueError("model: expected an nn.Linear that can be quantized, found none (quantize_'s report says why)")
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("compress draws its report with matplotlib: pip install 'kdq-kernels[plot]'")


@dataclass(frozen=True)
class TeacherAndLabels:
    """Soft targets at temperature 4, with a tenth for the labels of a batch that has them."""

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        return SoftTargets(T=4.0, alpha=1.0 if target is None else 0.9)(student, teacher, target)


@dataclass
class _Road:
    """The arguments of `compress`, and the phases."""

    model: nn.Module
    teacher: nn.Module | None
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

    def __post_init__(self) -> None:
        self.goal = self.model if self.teacher is None else self.teacher  # what the student learns from
        self.seconds: dict[str, float] = {}
        self.batches: int | None = None  # of an epoch, once one was gone through

    def run(self) -> Compressed:
        about = {
            "model": fingerprint_of(self.model),
            "teacher": fingerprint_of(self.goal),
            "precisions": [config_to_json(config) for config in self.precisions],
            "losses": [description(loss) for loss in self.losses],
            "training": [self.epochs, self.lr, self.seed],
        }
        distilled = fingerprint(**about)
        searched = fingerprint(after=distilled, budget=asdict(self.budget), refine=self.refine)
        student = self.switchable()
        if not self.folder.is_done("distil", distilled):
            self.check_budget()
        recursive = any(bits_of(config)[0] == 1 for config in self.precisions)
        distiller = SwitchableDistiller(self.goal, student, self.losses, recursive=recursive, seed=self.seed)
        self.make_adapters(distiller)
        self.phase("distil", distilled, partial(self.train, "distil", distiller, self.epochs))
        distiller.load_state_dict(self.trained("distil")["distiller"])
        plan = Plan.from_json(self.phase("search", searched, partial(self.search, student))["plan"])
        chosen = {name: config_to_json(config) for name, config in plan.items() if config is not None}
        tuned = fingerprint(after=searched, plan=chosen, epochs=self.finetune_epochs)
        tuner = Distiller(self.goal, student, self.losses)
        self.make_adapters(tuner)
        tuner.load_state_dict(distiller.state_dict())  # adapters are trained on too
        set_precision_(student, plan)
        self.phase("finetune", tuned, partial(self.train, "finetune", tuner, self.finetune_epochs))
        tuner.load_state_dict(self.trained("finetune")["distiller"])
        path = self.folder.path / "model.safetensors"
        self.phase("convert", tuned, partial(self.convert, student, plan, path))
        final = load(path, copy.deepcopy(self.model)).eval()
        report = self.phase("report", tuned, partial(self.report, student, final, plan))
        return Compressed(final, plan, CompressionReport.from_json(report["report"]), self.folder.path)

    def phase(self, name: str, print_: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The result of a phase, from the folder if it was finished with these inputs."""
        if not self.folder.is_done(name, print_):
            self.folder.begin(name, print_)
            start = time.perf_counter()
            result = work()
            self.folder.finish(name, print_, {"seconds": time.perf_counter() - start, **result})
        found = self.folder.result(name)
        self.seconds[name] = found["seconds"]
        return found

    # ---- the phases --------------------------------------------------------------------------------------------------

    def switchable(self) -> nn.Module:
        """The student before it is trained. A batch has gone through each precision: all scales have a start."""
        student = copy.deepcopy(self.model)
        prepare_switchable_(student, self.precisions)
        first = parse_batch(self.held[0], student)
        with evaluating(student), torch.no_grad(), keeping_precision(student):
            for config in self.precisions:
                set_precision_(student, config)
                first.logits(student, "model")
        return student

    def check_budget(self) -> None:
        """Raises before hours of training what the search would raise after them."""
        search_precision(
            copy.deepcopy(self.model),
            None,
            self.held[:1],
            budget=self.budget,
            candidates=self.precisions,
            sensitivity="weight_sqnr",
            rounds=1 if self.budget.latency_ms is None else ROUNDS,  # sizes need no timing
            progress=False,
        )

    def make_adapters(self, distiller: Distiller) -> None:
        """Those of losses on features, the same in a resumed run."""
        with seeded(self.seed, self.loader):
            distiller.prepare(self.held[0])

    def train(self, phase: str, distiller: Distiller, epochs: int) -> dict[str, Any]:
        """Epochs with a checkpoint after each; goes on from the last one."""
        optimizer = torch.optim.Adam(list(distiller.parameters()), lr=self.lr)
        losses: list[float] = []
        seconds, start = 0.0, time.perf_counter()
        state = self.folder.load_state(phase)
        if state is not None:
            distiller.load_state_dict(state["distiller"])
            optimizer.load_state_dict(state["optimizer"])
            losses, seconds, self.batches = list(state["losses"]), state["seconds"], state["batches"]
        start -= seconds
        with Progress(disable=not self.progress) as bar:
            task = bar.add_task(f"{phase}, {epochs} epochs", total=epochs, completed=len(losses))
            for epoch in range(len(losses), epochs):
                history = self.train_epoch(phase, distiller, optimizer, epoch, epochs, bar)
                losses, seconds = [*losses, history.losses[0]], time.perf_counter() - start
                known = {"distiller": distiller.state_dict(), "optimizer": optimizer.state_dict()}
                told = {"losses": losses, "seconds": seconds, "batches": self.batches}
                self.folder.save_state(phase, {**known, **told})
                bar.advance(task)
        return {"losses": losses, "seconds": seconds}

    def train_epoch(
        self, phase: str, distiller: Distiller, optimizer: Optimizer, epoch: int, epochs: int, bar: Progress
    ) -> History:
        """One epoch, which draws the same random numbers whatever came before it, and has as many batches as all."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        span = (epoch / epochs, (epoch + 1) / epochs)
        with seeded(seed_of(self.seed, phase, epoch), self.loader, distiller):
            try:
                history = distiller.fit(self.loader, 1, optimizer, span=span, progress=bar)
                if self.batches not in (None, history.steps):
                    raise ValueError(
                        f"loader: expected {self.batches} batches as in the first epoch, got {history.steps}"
                    )
            except (RuntimeError, ValueError) as error:
                kind = RuntimeError if isinstance(error, RuntimeError) else ValueError
                raise kind(f"epoch {epoch + 1} of {phase}: {error}{self.kept(phase)}") from error
        self.batches = history.steps
        return history

    def kept(self, phase: str) -> str:
        """For the message of an error in a training phase."""
        file = self.folder.state_file(phase)
        if not file.exists():
            return ""
        return f" (the checkpoint of the epoch before is {file}; it is kept, also by a run with other arguments)"

    def trained(self, phase: str) -> dict[str, Any]:
        """The checkpoint with which a training phase ended."""
        state = self.folder.load_state(phase)
        if state is None:
            raise ValueError(f"folder: the checkpoint {self.folder.state_file(phase)} of a finished phase is gone")
        self.batches = state["batches"]
        return state

    def search(self, student: nn.Module) -> dict[str, Any]:
        times = self.folder.file("search", ".json")  # a resumed search is to see the same
        find = partial(search_precision, student, self.goal, self.held, budget=self.budget, refine=self.refine)
        try:
            plan = find(times=times, progress=self.progress)
        except OtherTimes as error:
            warnings.warn(f"a search was broken off, and is measured anew; {error}", UserWarning, stacklevel=2)
            times.unlink()
            plan = find(times=times, progress=self.progress)
        write_atomically(self.folder.path / "plan.json", plan.save)
        return {"plan": plan.to_json()}

    def convert(self, student: nn.Module, plan: Plan, path: Path) -> dict[str, Any]:
        save(extract(student, plan), path)
        return {"file_bytes": path.stat().st_size}

    def report(self, student: nn.Module, final: nn.Module, plan: Plan) -> dict[str, Any]:
        """Also what the student was before its finetune, at every precision and at the plan, and the plan untrained."""
        before = copy.deepcopy(student)
        before.load_state_dict(self.trained("distil")["distiller"]["student"])
        choices = {short_name(config): extract(before, config) for config in precisions(before)}
        rounded = copy.deepcopy(self.model)
        quantize_(rounded, {name: _untrained(config) for name, config in plan.items()}, calibration=self.held)
        at_plan = {"plan, only rounded": rounded, "plan, not finetuned": extract(before, plan), "compressed": final}
        models = {"float": self.model, **choices, **at_plan}
        if self.teacher is not None:
            cached = isinstance(self.teacher, CachedTeacher)  # then its own time is wanted, not the cache's
            models["teacher"] = self.teacher.get_submodule("teacher") if cached else self.teacher
        found = evaluate(models, self.goal, self.held)

        def as_compressed(name: str) -> Model:
            return replace(found[name], latency_ms=found["compressed"].latency_ms)  # the same kernels

        report = CompressionReport(
            samples=count_samples(self.model, self.held),
            teacher=found.get("teacher"),
            before=found["float"],
            rounded=as_compressed("plan, only rounded"),
            searched=as_compressed("plan, not finetuned"),
            after=found["compressed"],
            choices=[found[name] for name in choices],
            layers=describe_layers(final, float_copy(student), rounded, self.model, self.held[0]),
            training=[Training(phase, self.folder.result(phase)["losses"]) for phase in ("distil", "finetune")],
            budget={name: value for name, value in asdict(self.budget).items() if value is not None},
            predicted={name: getattr(plan, name) for name in ("size_bytes", "latency_ms", "average_bits")},
            file_bytes=self.folder.result("convert")["file_bytes"],
            seconds=dict(self.seconds),
        )
        write_atomically(self.folder.path / "report.json", report.save_json)
        write_atomically(self.folder.path / "report.html", report.save_html)
        return {"report": report.to_json()}


def _untrained(config: Config) -> Config:
    """What rounding alone has in the place of a config whose grids are found by training (PACT, DoReFa)."""
    return replace(config, method="lsq") if isinstance(config, LowBit) else config


def seed_of(seed: int, phase: str, epoch: int) -> int:
    """A seed for each epoch of each phase."""
    return int(fingerprint(seed=seed, phase=phase, epoch=epoch)[:8], 16)
