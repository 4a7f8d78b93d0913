"""Weights of the terms of a loss, constant or by the progress of a fit (0 at its start, 1 at its end)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from kdq.losses.features import FeatureLoss

# Beside the features' losses, any function of (student logits, teacher logits, target) is a loss. One that has an
# attribute `needs_teacher` which is False does not make the `Distiller` run the teacher.
LogitLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Loss: TypeAlias = FeatureLoss | LogitLoss
Schedule: TypeAlias = Callable[[float], float]


@dataclass(frozen=True)
class Linear:
    """From start to end in a straight line."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Cosine:
    """From start to end along half a cosine: slow at both ends."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Step:
    """`Step({0.0: 1, 0.5: 0})`: each value holds from its progress on.

    Raises:
        ValueError: nothing holds from 0.0 on, or a key is not from 0 to 1.
    """

    values: Mapping[float, float]

    def __post_init__(self) -> None:
        if 0.0 not in self.values or not all(0 <= start <= 1 for start in self.values):
            raise ValueError(f"values: expected keys from 0 to 1, among them 0.0, got {sorted(self.values)}")

    def __call__(self, progress: float) -> float:
        return self.values[max(start for start in self.values if start <= progress)]


@dataclass(frozen=True)
class Weighted:
    """A loss with a factor: a number, or a schedule, that is any function of the progress.

        Weighted(SoftTargets(), kdq.losses.Cosine(1.0, 0.1))

    A term whose factor is 0 is not computed.

    Raises:
        TypeError: the loss is no loss, or a `Weighted` itself.
        ValueError: the factor is negative or not finite.
    """

    loss: Loss
    weight: float | Schedule = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.loss, Weighted) or not callable(self.loss):
            raise TypeError(f"loss: expected a loss without a weight, got {self.loss!r}")
        self.at(0.0)

    def at(self, progress: float) -> float:
        """The factor at a progress from 0 to 1.

        Raises:
            ValueError: it is negative or not finite.
        """
        value = self.weight(progress) if callable(self.weight) else self.weight
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"weight: expected a finite number, at least 0, got {value!r} at progress {progress:.3f}")
        return value
