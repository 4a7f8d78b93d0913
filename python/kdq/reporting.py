"""report: how far a quantized model is from its reference, what it weighs, and how fast it runs."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from kdq.layers.base import ACTIVATION_FUNCTIONS, InferenceLayer, fused_activation
from kdq.layers.qat import TrainingTwin
from kdq.losses import mean_kl
from kdq.observe import Batch, captured_outputs, check_same_shape, device_of, evaluating, parse_batch, rows_of

ROUNDS = 15
ROUND_SECONDS = 0.01


@dataclass(frozen=True)
class LayerError:
    """SQNR (dB) of a layer's output: 20 log10(|reference| / |reference - output|)."""

    name: str
    kind: str
    sqnr_db: float


@dataclass(frozen=True)
class Latency:
    """Seconds a call: median over the rounds, with the fastest and the slowest."""

    median: float
    fastest: float
    slowest: float


@dataclass(frozen=True)
class Report:
    """What `report` found. Losses and agreement are against the teacher; accuracies need labels (else None)."""

    samples: int
    accuracy: float | None
    teacher_accuracy: float | None
    agreement: float
    teacher_kl: float
    size_bytes: int
    teacher_size_bytes: int
    latency: Latency
    teacher_latency: Latency
    layers: list[LayerError]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, ready for json.dumps."""
        return asdict(self)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n")

    def __rich__(self) -> Group:
        table = Table("", "student", "teacher", title=f"on {self.samples} samples", title_justify="left")
        if self.accuracy is not None and self.teacher_accuracy is not None:
            table.add_row("accuracy", f"{self.accuracy:.2%}", f"{self.teacher_accuracy:.2%}")
        table.add_row("agreement with the teacher", f"{self.agreement:.2%}", "")
        table.add_row("KL to the teacher (nats)", f"{self.teacher_kl:.4f}", "")
        table.add_row("bytes on disk", f"{self.size_bytes:,}", f"{self.teacher_size_bytes:,}")
        table.add_row("time a batch", _span(self.latency), _span(self.teacher_latency))
        layers = Table("layer", "kind", "SQNR (dB)", title="output error by layer", title_justify="left")
        for layer in self.layers:
            layers.add_row(layer.name, layer.kind, f"{layer.sqnr_db:.1f}")
        return Group(table, layers) if self.layers else Group(table)

    def __str__(self) -> str:
        console = Console(width=110)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """SQNR by layer, and size and latency beside the teacher's, as a picture (needs matplotlib)."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        left.barh([layer.name for layer in self.layers], [layer.sqnr_db for layer in self.layers])
        left.invert_yaxis()
        left.set_xlabel("SQNR of the output (dB)")
        middle.bar(["teacher", "student"], [self.teacher_size_bytes / 1024, self.size_bytes / 1024])
        middle.set_ylabel("KiB on disk")
        times = [self.teacher_latency, self.latency]
        right.bar(
            ["teacher", "student"],
            [t.median * 1e6 for t in times],
            yerr=[
                [(t.median - t.fastest) * 1e6 for t in times],
                [(t.slowest - t.median) * 1e6 for t in times],
            ],
            capsize=4,
        )
        right.set_ylabel("time a batch (us)")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def report(
    student: nn.Module, teacher: nn.Module, loader: Iterable[Any], *, reference: nn.Module | None = None
) -> Report:
    """Compares a student with its teacher on a loader's batches.

    Args:
        student: typically after `convert_` or `quantize_`.
        teacher: outputs logits of the same shape.
        loader: batches of inputs, `(inputs, target)`, or dicts with "labels".
        reference: the float model with the student's layer names, for the SQNR by layer; None: the teacher, where
            names and output shapes agree.

    Raises:
        ValueError: the loader is empty, or the outputs' shapes differ.
    """
    batches = list(loader)
    if not batches:
        raise ValueError("loader: expected at least one batch, got none")
    with evaluating(student, teacher), torch.no_grad():
        outputs = [compared_outputs(student, teacher, parse_batch(batch, student)) for batch in batches]
        layers = layer_errors(student, teacher if reference is None else reference, batches[0])
        first = parse_batch(batches[0], student)
        times = interleaved_latency(
            [lambda: first.logits(student, "student"), lambda: first.logits(teacher, "teacher")],
            devices=(device_of(student), device_of(teacher)),
        )
    student_logits = torch.cat([o[0] for o in outputs])
    teacher_logits = torch.cat([o[1] for o in outputs])
    targets = [o[2] for o in outputs if o[2] is not None]
    target = torch.cat(targets) if len(targets) == len(outputs) else None
    return Report(
        samples=len(student_logits),
        accuracy=None if target is None else accuracy(student_logits, target),
        teacher_accuracy=None if target is None else accuracy(teacher_logits, target),
        agreement=accuracy(student_logits, teacher_logits.argmax(-1)),
        teacher_kl=teacher_kl(student_logits, teacher_logits),
        size_bytes=size_on_disk(student),
        teacher_size_bytes=size_on_disk(teacher),
        latency=times[0],
        teacher_latency=times[1],
        layers=layers,
    )


def accuracy(logits: Tensor, target: Tensor) -> float:
    """The share of rows whose largest logit is the target."""
    return float((logits.argmax(-1) == target).double().mean())


def teacher_kl(student: Tensor, teacher: Tensor) -> float:
    """KL(softmax(teacher) || softmax(student)), mean over the rows, in nats."""
    return float(mean_kl(teacher.double(), student.double()))


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the state dict as a safetensors file: tensors and header, without the quantization map."""
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path)
        return path.stat().st_size


def interleaved_latency(
    calls: Sequence[Callable[[], Any]], rounds: int = ROUNDS, devices: Iterable[torch.device | None] = ()
) -> list[Latency]:
    """Times several calls in turn, so that what else the machine does hits all alike.

    devices: where they run. On GPUs, where a call only queues its work, that is waited for.
    """
    gpus = {device for device in devices if device is not None and device.type == "cuda"}

    def wait() -> None:
        for gpu in gpus:
            torch.cuda.synchronize(gpu)

    def once(call: Callable[[], Any], repeat: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        wait()
        return (time.perf_counter() - start) / repeat

    repeats = [max(1, round(ROUND_SECONDS / max(min(once(c, 1) for _ in range(3)), 1e-7))) for c in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for samples, call, repeat in zip(times, calls, repeats, strict=True):
            samples.append(once(call, repeat))
    return [Latency(statistics.median(t), min(t), max(t)) for t in times]


def layer_errors(student: nn.Module, reference: nn.Module, batch: Any) -> list[LayerError]:
    """SQNR of every quantized layer whose name and output shape the reference has too.

    Where one side's layer computes its activation too, both are compared after it.
    """
    theirs = dict(reference.named_modules())
    ours = {n: m for n, m in student.named_modules() if isinstance(m, InferenceLayer | TrainingTwin)}
    quantized = {n: m for n, m in ours.items() if n in theirs}
    parsed = parse_batch(batch, student)
    with evaluating(student, reference), torch.no_grad():
        with captured_outputs(student, quantized, "student") as outputs:
            parsed.logits(student, "student")
        with captured_outputs(reference, quantized, "reference") as expected:
            parsed.logits(reference, "reference")
    return [
        LayerError(name, _kind(module), sqnr_db(*_alike(module, outputs[name], theirs[name], expected[name])))
        for name, module in quantized.items()
        if name in outputs and name in expected and outputs[name].shape == expected[name].shape
    ]


def _kind(module: nn.Module) -> str:
    activation = fused_activation(module)
    return type(module).__name__ + ("" if activation is None else f" + {activation}")


def _alike(ours: nn.Module, output: Tensor, theirs: nn.Module, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Both outputs after the activation, if either layer computes one."""
    mine, other = fused_activation(ours), fused_activation(theirs)
    if mine is None and other is not None:
        output = ACTIVATION_FUNCTIONS[other](output)
    if mine is not None and other is None:
        expected = ACTIVATION_FUNCTIONS[mine](expected)
    return output, expected


def sqnr_db(output: Tensor, reference: Tensor) -> float:
    """Signal to quantization noise ratio in decibels; infinite when equal."""
    signal = reference.double().norm()
    noise = (reference.double() - output.double()).norm()
    return float("inf") if noise == 0 else float(20 * torch.log10(signal / noise))


def compared_outputs(student: nn.Module, teacher: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits `[rows, classes]` of both models and the target `[rows]`, without rows whose target is -100."""
    ours, theirs = batch.logits(student, "student"), batch.logits(teacher, "teacher")
    check_same_shape(ours, theirs)
    rows, target, kept = rows_of(ours, batch.target)
    teacher_rows = theirs.reshape(-1, theirs.shape[-1])
    return rows[kept], teacher_rows[kept], None if target is None else target[kept]


def _span(t: Latency) -> str:
    return f"{t.median * 1e6:.0f} us ({t.fastest * 1e6:.0f} - {t.slowest * 1e6:.0f})"
