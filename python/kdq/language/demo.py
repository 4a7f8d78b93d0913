"""The demo `kdq demo language`: a byte-level transformer, distilled into 8, 4, 2 and 1 bits and run on the kernels.

Text: the source files of Python's standard library (`kdq.language.data`); whole files are held out. The model is that
of `kdq.language.model`. It is trained in float first. It is then the teacher and, quantized, where all students start
from; embeddings and attention's projections are quantized too, norms and attention itself stay float.

For each precision: the model quantized without training; a student that trains on the text alone; and one that trains
on the same batches for the same number of steps, half on the text and half on the teacher's distributions. All are
converted and evaluated on the real kernels, in bits per held-out byte. One seed: the ± of a difference is its standard
error over the held-out windows, not over trainings.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import kdq_kernels as kk
from kdq.configs import Binary, Config, Int8Dynamic, LowBit
from kdq.distill import Distiller
from kdq.io import save
from kdq.language.data import Batches, Text, library_text, spread_windows
from kdq.language.model import LanguageModel, Shape, complete
from kdq.language.show import picture, table
from kdq.language.speed import Speed, measure, without_products
from kdq.losses import CrossEntropy, Loss, SoftTargets
from kdq.observe import evaluating
from kdq.place import changed_copy, described, place_of
from kdq.quantize import convert_, prepare_qat_, quantize_
from kdq.reporting import accuracy, teacher_kl
from kdq.studies.paired import mean_and_error
from kdq.studies.study import processor_seconds

# Patterns of names: embeddings are taken only where one matches. The head decides between 256 bytes by differences that
# few bits cannot hold: it keeps 8 in every student, as is usual for a last layer.
PRECISIONS: dict[str, dict[str, Config]] = {
    "int8": {"*": Int8Dynamic()},
    "4 bits": {"head": Int8Dynamic(), "*": LowBit(weight_bits=4, act_bits=8)},
    "2 bits": {"head": Int8Dynamic(), "*": LowBit(weight_bits=2, act_bits=8)},
    "1 bit": {"head": Int8Dynamic(), "*": Binary()},
}
ARMS: dict[str, Loss] = {"text": CrossEntropy(), "teacher": SoftTargets(T=1.0, alpha=0.5)}
UNTRAINED = "untrained"
FLOAT_RATE = 1e-3
# Learning rates of the students, the same in both arms: the more rounding has moved, the further they have to go. (At
# 1e-3, int8 and 4 bits end above where they start.)
QAT_RATES = {"int8": 1e-4, "4 bits": 1e-4, "2 bits": 3e-4, "1 bit": 2e-3}
PROMPT = "class Reader:\n    def __init__(self, path"


@dataclass(frozen=True)
class Settings:
    """Sizes, how long to train, and where. `quick` is for seeing that everything works; its figures mean nothing."""

    shape: Shape = field(default_factory=Shape)
    teacher_steps: int = 3000
    qat_steps: int = 200
    batch: int = 8
    windows: int = 256  # held out
    rounds: int = 15  # of timing
    written: int = 80  # bytes of a completion
    device: str = "cpu"  # where models train and run

    @classmethod
    def quick(cls, device: str = "cpu") -> Settings:
        shape = Shape(blocks=1, width=32, heads=2, context=64)
        return cls(shape, teacher_steps=4, qat_steps=2, batch=4, windows=8, rounds=2, written=8, device=device)


@dataclass(frozen=True)
class Student:
    """One model on the kernels, and what it computes in training; in float, twice the same."""

    real: LanguageModel
    fake: LanguageModel


@dataclass(frozen=True)
class Score:
    """Of one student on the held-out windows.

    Attributes:
        bits: per byte, of each window `[windows]`.
        teacher_kl: nats.
        agreement, difference: share of the bytes for which kernels and fake-quant model find the same one likeliest,
            and relative norm of the difference of their logits.
    """

    bits: Tensor
    teacher_kl: float
    agreement: float
    difference: float

    def to_json(self) -> dict[str, Any]:
        return {
            "bits_per_byte": mean_and_error(self.bits.tolist()),
            "teacher_kl": self.teacher_kl,
            "kernel_agreement": self.agreement,
            "kernel_difference": self.difference,
        }


def train(
    teacher: LanguageModel, student: LanguageModel, loss: Loss, loader: Batches, rate: float, bar: Progress
) -> None:
    """One pass over the loader with Adam: the rate rises for a tenth of the steps, then falls to zero (cosine)."""
    distiller = Distiller(teacher, student, [loss])
    optimizer = torch.optim.Adam(list(distiller.parameters()), lr=rate, fused=True)
    steps = len(loader)

    def share(step: int) -> float:
        return min(1.0, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    distiller.fit(loader, 1, optimizer, scheduler=scheduler, clip_grad_norm=1.0, progress=bar)
    student.eval()


def students(
    teacher: LanguageModel, precision: str, text: Text, settings: Settings, bar: Progress
) -> dict[str, Student]:
    """The three of a precision, by arm."""
    configs, shape, device = PRECISIONS[precision], settings.shape, place_of(settings.device)
    calibration = [x for x, _ in Batches(text.training, shape.context, settings.batch, 2, seed=1)]
    plain = changed_copy(teacher, partial(quantize_, config=configs, calibration=calibration), device)
    found = {UNTRAINED: Student(plain, plain)}
    for arm, loss in ARMS.items():
        fake = changed_copy(teacher, partial(prepare_qat_, config=configs), device)
        loader = Batches(text.training, shape.context, settings.batch, settings.qat_steps, seed=2)
        train(teacher, fake, loss, loader, QAT_RATES[precision], bar)
        real = changed_copy(fake, convert_, device)
        found[arm] = Student(real, fake)
    return found


# ---- what every model is put to --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """The held-out windows x `[windows, context]` with the bytes y that follow, and the teacher's logits on them; the
    prompt and how many bytes to write behind it; where models are saved."""

    x: Tensor
    y: Tensor
    expected: Tensor
    prompt: bytes
    written: int
    folder: Path

    def row(self, precision: str, arms: Mapping[str, Student]) -> dict[str, Any]:
        """The report's row of a precision; its models are saved."""
        scores = {arm: self.score(student) for arm, student in arms.items()}
        gain = None
        if len(scores) > 1:  # of the teacher, in bits per byte
            gain = mean_and_error((scores["text"].bits - scores["teacher"].bits).tolist())
        for arm, student in arms.items():
            path = self.folder / f"{precision}-{arm}.safetensors".replace(" ", "-").replace("-.", ".")
            save(student.real, path)
        written = {arm: complete(student.real, self.prompt, self.written) for arm, student in arms.items()}
        return {
            "precision": precision,
            "arms": {arm: found.to_json() for arm, found in scores.items()},
            "gain": gain,
            "size_bytes": path.stat().st_size,
            "completion": {arm: text.decode(errors="replace") for arm, text in written.items()},
        }

    def score(self, student: Student) -> Score:
        logits = logits_of_windows(student.real, self.x)
        fake = logits if student.fake is student.real else logits_of_windows(student.fake, self.x)
        rows = logits.flatten(0, 1)
        losses = F.cross_entropy(rows, self.y.flatten(), reduction="none").view_as(self.y)
        return Score(
            bits=losses.mean(1) / math.log(2),
            teacher_kl=teacher_kl(rows, self.expected.flatten(0, 1)),
            agreement=accuracy(logits, fake.argmax(-1)),
            difference=float((logits - fake).norm() / fake.norm()),
        )


@torch.inference_mode()
def logits_of_windows(model: LanguageModel, x: Tensor) -> Tensor:
    """`[windows, context, 256]`, in float32."""
    with evaluating(model):
        return torch.cat([model(part).float() for part in x.split(16)])


# ---- the whole demo --------------------------------------------------------------------------------------------------


def run_language(out: Path, settings: Settings, console: Console, prompt: str = PROMPT) -> dict[str, Any]:
    """Runs the demo, prints its table and completions, and writes `report.json`, `language.png` and checkpoints to
    `out`. Returns the report.

    Raises:
        ValueError: the prompt is empty, or leaves no room for a completion, or a device that is none.
        RuntimeError: a model that is to be timed gives other logits than its fake-quant twin; or the device is a GPU
            that is not there, or for which this build has no operators.
    """
    device = place_of(settings.device)
    room = settings.shape.context - settings.written
    if not 0 < len(prompt.encode()) <= room:
        raise ValueError(f"prompt: expected 1 to {room} bytes, got {len(prompt.encode())}")
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    start, used = time.perf_counter(), processor_seconds()
    text = library_text()
    with Progress(console=console, transient=True) as bar:
        rows, speed = train_and_measure(text, settings, prompt.encode(), folder, bar)
    report: dict[str, Any] = {
        "settings": asdict(settings),
        "prompt": prompt,
        "place": described(device),
        "cpu": kk.build_info()["cpu"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in LanguageModel(settings.shape).parameters()),
        "training_bytes": len(text.training),
        "held_out_bytes": len(text.held_out),
        "files": [text.training_files, text.held_out_files],
        "rows": rows,
        "speed": {name: found.to_json() for name, found in speed.items()},
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(processor_seconds() - used, 1),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    picture(report, out / "language.png")
    print_report(report, console)
    console.print(f"wrote {out / 'report.json'}, {out / 'language.png'} and {len(list(folder.iterdir()))} checkpoints")
    return report


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The table, what every model writes behind the prompt, and how long it all took."""
    console.print(table(report))
    for row in report["rows"]:
        for arm, completion in row["completion"].items():
            console.print(f"[bold]{row['precision']} {arm}[/bold]")
            console.print(report["prompt"] + completion, markup=False, highlight=False)
    clock, processor = (duration(report[key]) for key in ("seconds", "processor_seconds"))
    console.print(f"{clock} by the clock, {processor} of the processor")


def duration(seconds: float) -> str:
    return f"{seconds:.1f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def train_and_measure(
    text: Text, settings: Settings, prompt: bytes, folder: Path, bar: Progress
) -> tuple[list[dict[str, Any]], dict[str, Speed]]:
    """The report's rows and speeds."""
    shape = settings.shape
    task = bar.add_task("teacher", total=2 + len(PRECISIONS))
    torch.manual_seed(0)
    device = place_of(settings.device)
    teacher = LanguageModel(shape).to(device)
    loader = Batches(text.training, shape.context, settings.batch, settings.teacher_steps, seed=0)
    train(teacher, teacher, CrossEntropy(), loader, FLOAT_RATE, bar)
    half = copy.deepcopy(teacher).bfloat16()
    in_float = {"float32": {"": Student(teacher, teacher)}, "bfloat16": {"": Student(half, half)}}
    x, y = (part.to(device) for part in spread_windows(text.held_out, shape.context, settings.windows))
    trial = Trial(x, y, logits_of_windows(teacher, x), prompt, settings.written, folder)
    rows: list[dict[str, Any]] = []
    timed: dict[str, LanguageModel] = {}
    twins: dict[str, LanguageModel] = {}
    for precision in (*in_float, *PRECISIONS):
        bar.update(task, description=precision)
        arms = in_float.get(precision) or students(teacher, precision, text, settings, bar)
        rows.append(trial.row(precision, arms))
        *_, last = arms.values()
        timed[precision], twins[precision] = last.real, teacher if precision in in_float else last.fake
        bar.advance(task)
    bar.update(task, description="timing")
    timed["no products"] = without_products(timed["int8"])
    return rows, measure(timed, twins, x[:1], settings.rounds)
