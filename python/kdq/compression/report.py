"""What a compression gave: the student before and after, each choice that the switchable student offers, each layer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table


@dataclass(frozen=True)
class Model:
    """One model, evaluated as it would be deployed.

    Attributes:
        accuracy: share of right answers on the validation data; None without labels.
        teacher_kl: KL(teacher || model), nats.
        size_bytes: of all tensors as `kdq.save` writes them, as a `Budget` counts; a file's header comes on top.
        latency_ms: of the first validation batch, median.
    """

    name: str
    accuracy: float | None
    teacher_kl: float
    size_bytes: int
    latency_ms: float


@dataclass(frozen=True)
class Layer:
    """A quantized layer: its precision, and the SQNR (dB) of its output; None where it cannot be told.

    Attributes:
        rounded_sqnr_db: against the float model, of that model rounded to the plan without any training.
        sqnr_db: against the float model, of the compressed one.
        own_sqnr_db: of the compressed one, against what the same trained weights give in float.
    """

    name: str
    precision: str
    weight_bits: int
    act_bits: int
    weights: int
    rounded_sqnr_db: float | None
    sqnr_db: float | None
    own_sqnr_db: float | None


@dataclass(frozen=True)
class Training:
    """The mean loss of each epoch of a phase."""

    phase: str
    losses: list[float]


@dataclass(frozen=True)
class CompressionReport:
    """The result of `compress`.

    Attributes:
        before, after: the float model, and the compressed one.
        teacher: where one was given.
        rounded: the float model with the plan's precisions, without any training.
        searched: the plan before its finetune.
        choices: the switchable student at each of its precisions, without further training: what else could be had.
        predicted: what the search expected of the plan: size_bytes, latency_ms, average_bits.
        file_bytes: of `model.safetensors`, with its header.
        seconds: that each phase took, all its runs together; not the report itself.
    """

    samples: int
    teacher: Model | None
    before: Model
    rounded: Model
    searched: Model
    after: Model
    choices: list[Model]
    layers: list[Layer]
    training: list[Training]
    budget: dict[str, float]
    predicted: dict[str, float]
    file_bytes: int
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, ready for json.dumps."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CompressionReport:
        """The inverse of `to_json`."""
        fields = dict(data)
        for name in ("teacher", "before", "rounded", "searched", "after"):
            fields[name] = None if fields[name] is None else Model(**fields[name])
        fields["choices"] = [Model(**m) for m in fields["choices"]]
        fields["layers"] = [Layer(**layer) for layer in fields["layers"]]
        fields["training"] = [Training(**t) for t in fields["training"]]
        return cls(**fields)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n")

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """One page that needs nothing else: tables and plots (needs matplotlib)."""
        from kdq.compression.page import html

        Path(path).write_text(html(self), encoding="utf-8")

    @property
    def models(self) -> list[Model]:
        """All students that were evaluated; the compressed one last."""
        return [self.before, *self.choices, self.rounded, self.searched, self.after]

    def __rich__(self) -> Group:
        models = Table(*MODEL_COLUMNS, title=f"on {self.samples:,} samples", title_justify="left")
        front = pareto_front(self.models)
        if self.teacher is not None:
            models.add_row(*model_cells(self.teacher, False), style="dim")
        for m in self.models:
            models.add_row(*model_cells(m, m in front), style="bold" if m is self.after else None)
        layers = Table(*LAYER_COLUMNS, title="layers of the compressed model", title_justify="left")
        for layer in self.layers:
            layers.add_row(*layer_cells(layer))
        figures = Table.grid(padding=(0, 2))
        for name, value, remark in key_figures(self):
            figures.add_row(name, f"[bold]{value}[/bold]", remark)
        figures.add_row("budget", amounts(self.budget), f"predicted: {amounts(self.predicted)}")
        return Group(figures, models, layers)

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


MODEL_COLUMNS = ("model", "accuracy", "KL to the teacher", "bytes", "ms a batch", "Pareto front")
SQNR_COLUMNS = ("SQNR only rounded, dB", "SQNR compressed, dB", "SQNR to own float, dB")
LAYER_COLUMNS = ("layer", "precision", "weights", "weight / input bits", *SQNR_COLUMNS)


def times(before: float, after: float, more: str, less: str) -> str:
    """ "8.0x smaller", or "1.2x larger"."""
    return f"{before / after:.3g}x {less}" if after <= before else f"{after / before:.3g}x {more}"


def key_figures(report: CompressionReport) -> list[tuple[str, str, str]]:
    """What one wants to know first: name, value, remark."""
    before, after = report.before, report.after
    figures = [
        (
            "size",
            times(before.size_bytes, after.size_bytes, "larger", "smaller"),
            f"{before.size_bytes:,} → {after.size_bytes:,} bytes",
        ),
        (
            "time",
            times(before.latency_ms, after.latency_ms, "slower", "faster"),
            f"{before.latency_ms:.3g} → {after.latency_ms:.3g} ms a batch",
        ),
        ("KL to the teacher", f"{after.teacher_kl:.4f} nats", f"before: {before.teacher_kl:.4f}"),
    ]
    if before.accuracy is not None and after.accuracy is not None:
        figures.insert(0, ("accuracy", f"{after.accuracy:.2%}", f"before: {before.accuracy:.2%}"))
    return figures


def amounts(values: Mapping[str, float]) -> str:
    """Budgets and predictions as people read them."""
    forms = {"size_bytes": "{:,.0f} bytes", "latency_ms": "{:.3g} ms a batch", "average_bits": "{:.3g} bits a weight"}
    return ", ".join(forms[name].format(value) for name, value in values.items())


def model_cells(m: Model, on_front: bool) -> tuple[str, ...]:
    """In the order of MODEL_COLUMNS."""
    accuracy = "" if m.accuracy is None else f"{m.accuracy:.2%}"
    return (m.name, accuracy, f"{m.teacher_kl:.4f}", f"{m.size_bytes:,}", f"{m.latency_ms:.3g}", "yes" * on_front)


def layer_cells(layer: Layer) -> tuple[str, ...]:
    """In the order of LAYER_COLUMNS."""
    values = (layer.rounded_sqnr_db, layer.sqnr_db, layer.own_sqnr_db)
    sqnr = ["" if value is None else f"{value:.1f}" for value in values]
    return (layer.name, layer.precision, f"{layer.weights:,}", f"{layer.weight_bits} / {layer.act_bits}", *sqnr)


def quality(m: Model) -> float:
    """What is drawn upwards: accuracy, or the negative KL where there are no labels."""
    return -m.teacher_kl if m.accuracy is None else m.accuracy


def pareto_front(models: Sequence[Model]) -> list[Model]:
    """Those that no other beats: at least as good, small and fast, and better in one of the three."""

    def beats(a: Model, b: Model) -> bool:
        ours, theirs = (-quality(a), a.size_bytes, a.latency_ms), (-quality(b), b.size_bytes, b.latency_ms)
        return all(x <= y for x, y in zip(ours, theirs, strict=True)) and ours != theirs

    return [m for m in models if not any(beats(other, m) for other in models)]
