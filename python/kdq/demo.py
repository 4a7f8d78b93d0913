"""The demo `kdq demo digits`: what a teacher is worth when a small network is compressed to few bits.

Data: scikit-learn's bundled handwritten digits, 8x8 pixels, 1797 samples, split anew for each seed into 1200 for the
teacher and 597 for testing. The student's own labelled data are 200 of the 1200: labels are scarce where one
compresses, and the teacher knows more than they tell. Both models are multilayer perceptrons with batch norm before
each linear layer.

For each precision two students start from the same float student and see the same batches for the same number of
steps: one learns from the labels alone, the other also from the teacher's soft targets. All their linear layers are
quantized, weights and activations alike. Every result is converted and evaluated on the real kernels.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.configs import Binary, Config, Int8Dynamic, LowBit
from kdq.io import save
from kdq.losses import SoftTargets
from kdq.observe import evaluating
from kdq.place import changed_copy, described, place_of
from kdq.quantize import convert_, prepare_qat_
from kdq.reporting import Latency, accuracy, interleaved_latency, size_on_disk, teacher_kl
from kdq.studies.paired import mean_and_error
from kdq.studies.training import Batches, train

PRECISIONS: dict[str, Config] = {
    "int8": Int8Dynamic(),
    "4 bits": LowBit(weight_bits=4, act_bits=4),
    "2 bits": LowBit(weight_bits=2, act_bits=2),
    "1 bit": Binary(),
}
TEACHER_SAMPLES = 1200
STUDENT_SAMPLES = 200
BATCH = 50
LATENCY_BATCH = 64
ARMS = {"labels": SoftTargets(alpha=0.0), "teacher": SoftTargets(T=4.0, alpha=0.9)}


@dataclass(frozen=True)
class Settings:
    """How long to train, and where. `quick` is for seeing that everything works; its accuracies mean nothing."""

    seeds: int = 5
    teacher_epochs: int = 30
    float_epochs: int = 60
    qat_epochs: int = 60
    device: str = "cpu"  # where models train and run

    @classmethod
    def quick(cls, seeds: int, device: str = "cpu") -> Settings:
        return cls(seeds=seeds, teacher_epochs=2, float_epochs=3, qat_epochs=3, device=device)


@dataclass(frozen=True)
class Digits:
    """One seed's split. x float32 `[n, 64]` in [0, 1], y int64 `[n]`; for testing, where the models are."""

    teacher_x: Tensor
    teacher_y: Tensor
    student_x: Tensor
    student_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Result:
    """One student, evaluated on the kernels."""

    precision: str
    arm: str
    seed: int
    accuracy: float
    teacher_kl: float
    size_bytes: int
    kernel_agreement: float  # share of test samples on which fake-quant model and kernels choose the same class
    kernel_difference: float  # largest difference of their logits


def load_split(seed: int, device: torch.device) -> Digits:
    """Shuffles the digits with the seed and splits them."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x = torch.from_numpy(data.data).float()[order] / 16
    y = torch.from_numpy(data.target).long()[order]
    n, k = TEACHER_SAMPLES, STUDENT_SAMPLES
    return Digits(x[:n], y[:n], x[:k], y[:k], x[n:].to(device), y[n:].to(device))


def mlp(width: int, dropout: float = 0.0) -> nn.Sequential:
    """64 -> width -> width -> 10, batch norm before each linear layer: it centres what a 1-bit layer takes the sign
    of."""
    layers: list[nn.Module] = [nn.BatchNorm1d(64), nn.Linear(64, width), nn.ReLU()]
    layers += [nn.Dropout(dropout), nn.BatchNorm1d(width), nn.Linear(width, width), nn.ReLU()]
    layers += [nn.Dropout(dropout), nn.BatchNorm1d(width), nn.Linear(width, 10)]
    return nn.Sequential(*layers)


def batches(x: Tensor, y: Tensor, epochs: int, seed: int) -> Batches:
    return Batches(x, y, BATCH, epochs * (len(x) // BATCH), seed)


def run_seed(seed: int, settings: Settings, folder: Path, advance: Any) -> tuple[list[Result], dict[str, nn.Module]]:
    """Teacher, float student, and all compressed students of one seed. Returns also the converted models of the
    teacher arm."""
    torch.manual_seed(seed)
    device = place_of(settings.device)
    data = load_split(seed, device)
    teacher, student = mlp(512, dropout=0.2).to(device), mlp(256).to(device)
    teachers_own = batches(data.teacher_x, data.teacher_y, settings.teacher_epochs, seed)
    train(teacher, teacher, [ARMS["labels"]], teachers_own, 2e-3)
    advance()
    train(
        student, student, [ARMS["labels"]], batches(data.student_x, data.student_y, settings.float_epochs, seed), 2e-3
    )
    advance()
    with torch.inference_mode():
        expected = teacher(data.test_x)
    results = [
        evaluate("float32", "teacher itself", seed, teacher, teacher, data, expected),
        evaluate("float32", "labels", seed, student, student, data, expected),
    ]
    models: dict[str, nn.Module] = {"float32 teacher": teacher, "float32": student}
    for precision, config in PRECISIONS.items():
        for arm, loss in ARMS.items():
            fake = changed_copy(student, partial(prepare_qat_, config=config), device)
            loader = batches(data.student_x, data.student_y, settings.qat_epochs, seed + 1000)
            train(fake, teacher, [loss], loader, 1e-3)
            real = changed_copy(fake, convert_, device)
            results.append(evaluate(precision, arm, seed, real, fake, data, expected))
            name = f"{precision.replace(' ', '-')}-{arm}-seed{seed}"
            save(real, folder / f"{name}.safetensors")
            if arm == "teacher":
                models[precision] = real
            advance()
    save(teacher, folder / f"float32-teacher-seed{seed}.safetensors")
    save(student, folder / f"float32-student-seed{seed}.safetensors")
    return results, models


@torch.inference_mode()
def evaluate(
    precision: str,
    arm: str,
    seed: int,
    real: nn.Module,
    fake: nn.Module,
    data: Digits,
    teacher_logits: Tensor,
) -> Result:
    """Accuracy and distance to the teacher of the model on the kernels, and its agreement with the fake-quant model."""
    with evaluating(real, fake):
        logits, trained = real(data.test_x), fake(data.test_x)
    return Result(
        precision=precision,
        arm=arm,
        seed=seed,
        accuracy=accuracy(logits, data.test_y),
        teacher_kl=teacher_kl(logits, teacher_logits),
        size_bytes=size_on_disk(real),
        kernel_agreement=accuracy(logits, trained.argmax(-1)),
        kernel_difference=float((logits - trained).abs().max()),
    )


def measure_latency(models: dict[str, nn.Module], device: torch.device) -> dict[str, Latency]:
    """One forward pass of a batch of 64, all models interleaved, on one thread."""
    x = torch.rand(LATENCY_BATCH, 64, generator=torch.Generator().manual_seed(0)).to(device)
    with one_thread(), torch.inference_mode():
        times = interleaved_latency([partial(model.eval(), x) for model in models.values()], devices=[device])
    return dict(zip(models, times, strict=True))


@contextmanager
def one_thread() -> Iterator[None]:
    """Layers this small lose more to waking a second thread than they gain from it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- what is shown ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """One row of the table: both arms of one precision over all seeds. Accuracies in percent."""

    precision: str
    accuracy: dict[str, tuple[float, float]]  # arm -> mean, standard deviation
    gain: tuple[float, float] | None  # paired difference teacher - labels: mean, standard error
    teacher_kl: dict[str, float]
    size_bytes: int
    latency: Latency
    speedup: float  # float student's time over this one's
    kernel_agreement: float
    kernel_difference: float


def summarize(results: list[Result], latency: dict[str, Latency]) -> list[Summary]:
    """A summary for the float student and for each precision."""
    rows = []
    for precision in ("float32", *PRECISIONS):
        mine = [r for r in results if r.precision == precision and r.arm in ARMS]
        arms = {arm: [r for r in mine if r.arm == arm] for arm in ARMS}
        scores = {arm: [100 * r.accuracy for r in rs] for arm, rs in arms.items() if rs}
        gain = None
        if len(scores) == 2:
            gain = mean_and_error([b - a for a, b in zip(scores["labels"], scores["teacher"], strict=True)])
        rows.append(
            Summary(
                precision=precision,
                accuracy={
                    arm: (statistics.fmean(s), statistics.stdev(s) if len(s) > 1 else math.nan)
                    for arm, s in scores.items()
                },
                gain=gain,
                teacher_kl={arm: statistics.fmean(r.teacher_kl for r in rs) for arm, rs in arms.items() if rs},
                size_bytes=mine[0].size_bytes,
                latency=latency[precision],
                speedup=latency["float32"].median / latency[precision].median,
                kernel_agreement=min(r.kernel_agreement for r in mine),
                kernel_difference=max(r.kernel_difference for r in mine),
            )
        )
    return rows


def spread(value: tuple[float, float] | None, digits: int = 2, sign: bool = False) -> str:
    """`97.31 ± 0.42`."""
    if value is None:
        return ""
    mean, deviation = value
    text = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return text if math.isnan(deviation) else f"{text} ± {deviation:.{digits}f}"


def table(rows: list[Summary], seeds: int, teacher_accuracy: tuple[float, float], place: str) -> Table:
    """The demo's result. place: where models ran, in words."""
    result = Table(
        title=f"Digits, {seeds} seeds; float teacher {spread(teacher_accuracy)} % accuracy",
        caption=(
            "accuracy: mean ± standard deviation over seeds; gain: of the teacher, paired difference in points ± "
            "standard error; KL: to the teacher, nats; bytes: on disk; "
            f"us: batch of {LATENCY_BATCH}, median and below it fastest-slowest; x: times faster than the "
            "float student; agree: share of test samples on which kernels and fake-quant model choose the same class, "
            "worst seed. "
            f"Run on: {place}."
        ),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for column in ("student", "taught by", "accuracy %", "gain", "KL", "bytes", "us", "x", "agree"):
        left = column in ("student", "taught by")
        result.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        time = row.latency
        span = f"{time.fastest * 1e6:.0f}-{time.slowest * 1e6:.0f}"
        shared = [
            f"{row.size_bytes:,}",
            f"{time.median * 1e6:.0f}",
            f"{row.speedup:.2f}",
            f"{row.kernel_agreement:.1%}",
        ]
        result.add_row(
            row.precision, "labels", spread(row.accuracy["labels"]), "", f"{row.teacher_kl['labels']:.3f}", *shared
        )
        if row.gain is None:
            result.add_row(*[""] * 6, span)
        else:
            accuracy, gain = spread(row.accuracy["teacher"]), spread(row.gain, sign=True)
            result.add_row("", "teacher", accuracy, gain, f"{row.teacher_kl['teacher']:.3f}", "", span)
        result.add_section()
    return result


def plot(rows: list[Summary], path: Path) -> None:
    """Accuracy and gain by precision, size and time by precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [row.precision for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for arm, offset in (("labels", -0.12), ("teacher", 0.12)):
        points = [(i + offset, row.accuracy[arm]) for i, row in enumerate(rows) if arm in row.accuracy]
        errors = [0.0 if math.isnan(value[1]) else value[1] for _, value in points]
        label = "labels only" if arm == "labels" else "with teacher"
        axes[0].errorbar(
            [x for x, _ in points], [v[0] for _, v in points], yerr=errors, fmt="o", capsize=4, label=label
        )
    axes[0].set_ylabel("test accuracy, % (± standard deviation)")
    axes[0].legend()
    axes[1].bar(names, [row.size_bytes / 1024 for row in rows], color="tab:gray")
    axes[1].set_ylabel("KiB on disk")
    axes[2].bar(names, [row.latency.median * 1e6 for row in rows], color="tab:green")
    axes[2].set_ylabel(f"time of a batch of {LATENCY_BATCH}, us")
    for axis in axes:
        axis.set_xticks(range(len(names)), names)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle("Digits: a student compressed with and without its teacher, on the real kernels")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run_digits(out: Path, settings: Settings, console: Console) -> list[Summary]:
    """Runs the demo, prints its table and writes `report.json`, `digits.png` and checkpoints to `out`.

    Raises:
        ValueError: fewer than one seed, or a device that is none.
        RuntimeError: the device is a GPU that is not there, or for which this build has no operators.
    """
    device = place_of(settings.device)
    if settings.seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {settings.seeds}")
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    models: dict[str, nn.Module] = {}
    steps = settings.seeds * (2 + len(PRECISIONS) * len(ARMS))
    with one_thread(), Progress(console=console, transient=True) as progress:
        task = progress.add_task("digits", total=steps)
        for seed in range(settings.seeds):
            progress.update(task, description=f"seed {seed + 1} of {settings.seeds}")
            found, models = run_seed(seed, settings, folder, lambda: progress.advance(task))
            results += found
    latency = measure_latency(models, device)
    rows = summarize(results, latency)
    teacher = [100 * r.accuracy for r in results if r.arm == "teacher itself"]
    deviation = statistics.stdev(teacher) if len(teacher) > 1 else math.nan
    console.print(table(rows, settings.seeds, (statistics.fmean(teacher), deviation), described(device)))
    content = {
        "settings": asdict(settings),
        "place": described(device),
        "cpu": kk.build_info()["cpu"],
        "torch": torch.__version__,
        "teacher_accuracy": teacher,
        "summary": [asdict(row) for row in rows],
        "results": [asdict(result) for result in results],
    }
    (out / "report.json").write_text(json.dumps(_without_nan(content), indent=2) + "\n")
    plot(rows, out / "digits.png")
    console.print(f"wrote {out / 'report.json'}, {out / 'digits.png'} and {len(list(folder.iterdir()))} checkpoints")
    return rows


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
