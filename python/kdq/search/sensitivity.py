"""How far a model is from its teacher, and by how much one layer's precision moves it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from kdq.configs import Config
from kdq.distill import mean_kl
from kdq.observe import Batch, check_same_shape, rows_of
from kdq.search.plan import precision_name
from kdq.search.precision import Precision

Sensitivity: TypeAlias = Literal["teacher_kl", "label_loss", "weight_sqnr"]
SENSITIVITIES = ("teacher_kl", "label_loss", "weight_sqnr")

Table: TypeAlias = Mapping[str, Mapping[Config | None, float]]


class Distance:
    """The mean over all rows of the batches of KL(teacher || student), or of the labels' cross-entropy, in nats.

    Rows whose target is -100 do not count. The teacher runs once. Computed in float64.

    Raises:
        ValueError: labels are missing for "label_loss", there is no teacher for "teacher_kl", the outputs' shapes
            differ, or no row counts.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, batches: Sequence[Batch], kind: Literal["kl", "label"]
    ) -> None:
        self.student, self.batches, self.kind = student, batches, kind
        if kind == "kl" and teacher is None:
            raise ValueError('teacher: sensitivity="teacher_kl" needs one, got None')
        if kind == "label" and any(batch.target is None for batch in batches):
            raise ValueError('loader: sensitivity="label_loss" needs labels in every batch')
        self.taught: list[Tensor] = []
        if kind == "kl" and teacher is not None:
            self.taught = [batch.logits(teacher, "teacher") for batch in batches]

    def __call__(self) -> float:
        total, count = 0.0, 0
        for index, batch in enumerate(self.batches):
            logits = batch.logits(self.student, "student")
            rows, target, kept = rows_of(logits, batch.target)
            rows = rows[kept].double()
            if len(rows) == 0:
                continue
            if self.kind == "kl":
                check_same_shape(logits, self.taught[index])
                taught = self.taught[index].reshape(-1, logits.shape[-1])[kept].double()
                mean = mean_kl(taught, rows)
            else:
                assert target is not None  # checked on construction
                mean = F.cross_entropy(rows, target[kept])
            total += float(mean) * len(rows)
            count += len(rows)
        if count == 0:
            raise ValueError("loader: no row counts, every target is -100 or the batches are empty")
        return total / count


def finite(value: float, what: str) -> float:
    """value, unless it is NaN or infinite: then a ValueError that says where."""
    if not math.isfinite(value):
        raise ValueError(f"the distance of {what} is {value}: check the models' outputs and the data")
    return value


def increases(
    distance: Distance,
    precision: Precision,
    names: Sequence[str],
    candidates: Sequence[Config | None],
    around: Mapping[str, Config | None],
    base: float,
    step: Callable[[], Any],
) -> Table:
    """By how much the distance exceeds `base` when one layer leaves `around` for another precision.

    The model already is at `around`, whose distance is base.
    """
    table: dict[str, dict[Config | None, float]] = {}
    for name in names:
        table[name] = {}
        for config in candidates:
            if config == around[name]:
                table[name][config] = 0.0
            else:
                with precision.at(name, config):
                    what = f"the student with {name!r} at {precision_name(config)}"
                    table[name][config] = finite(distance(), what) - base
            step()
    return table


def weight_noise(
    student: nn.Module, precision: Precision, names: Sequence[str], candidates: Sequence[Config | None]
) -> Table:
    """`|w - rounded w|^2 / |w|^2` of each layer at each precision; 0 in float and for weights that are all 0."""
    table: dict[str, dict[Config | None, float]] = {name: {} for name in names}
    for name in names:
        weight = precision.layers[name].weight.detach().double()
        power = float(weight.square().sum())
        for config in candidates:
            noise = 0.0
            if config is not None and power > 0:
                with precision.at(name, config):
                    layer: Any = student.get_submodule(name)
                    noise = float((layer.dequantized_weight().double() - weight).square().sum()) / power
            table[name][config] = finite(noise, f"{name!r}'s weight at {precision_name(config)}")
    return table
