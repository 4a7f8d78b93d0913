"""Training in phases, as in QKD: each has its own losses, learning rate and, if wanted, precision or sparsity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdq.configs import ConfigMap, check_configs
from kdq.losses import CrossEntropy, Loss, SoftTargets, Weighted
from kdq.prune import check_sparsity


@dataclass(frozen=True)
class Phase:
    """One part of `Distiller.run`.

    Args:
        name: for the reader.
        epochs: at least 1.
        losses: None: the distiller's own.
        lr: learning rate of the phase's Adam.
        config: None: the student stays at its precision; otherwise `lower_precision_(student, config)` comes first.
        sparsity: None: no more weights are pruned; otherwise `prune_(student, sparsity)` comes first of all.
        train_teacher: as in `Distiller`.
    """

    name: str
    epochs: int
    losses: Sequence[Loss | Weighted] | None = None
    lr: float = 1e-3
    config: ConfigMap | None = None
    train_teacher: bool = False
    sparsity: float | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs: expected at least 1, got {self.epochs}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr: expected a positive finite number, got {self.lr!r}")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        if self.config is not None:
            check_configs(self.config)  # a wrong config is an error here, not after the phases before


def qkd_phases(
    epochs: tuple[int, int, int],
    *,
    T: float = 4.0,
    lr: float = 1e-3,
    config: ConfigMap | None = None,
) -> list[Phase]:
    """Self-study, co-study and tutoring.

    Kim, Bhalgat, Lee, Patel, Kwak: QKD: Quantization-aware Knowledge Distillation, 2019. In self-study the low-bit
    student learns from the labels alone. In co-study both learn from the labels and each from the other's soft targets,
    so that the teacher becomes one that the student can follow. In tutoring the teacher is frozen.

    Args:
        epochs: of the three.
        T: temperature of the soft targets.
        lr: of all three.
        config: precision from the first phase on; None: as the student is prepared.
    """
    if len(epochs) != 3:
        raise ValueError(f"epochs: expected those of the three phases, got {epochs!r}")
    together = (CrossEntropy(), SoftTargets(T=T))
    return [
        Phase("self-study", epochs[0], (CrossEntropy(),), lr, config),
        Phase("co-study", epochs[1], together, lr, train_teacher=True),
        Phase("tutoring", epochs[2], together, lr),
    ]


def pruning_phases(
    sparsity: float,
    epochs: int,
    *,
    steps: int = 4,
    losses: Sequence[Loss | Weighted] | None = None,
    lr: float = 1e-3,
) -> list[Phase]:
    """Prunes in rising steps, and retrains after each.

    Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks, 2015. Step i of n
    prunes to `sparsity * (1 - (1 - i / n)**3)`: much at first, where much can go (Zhu, Gupta: To prune, or not to
    prune, 2017).

    Args:
        sparsity: share of the weights of each layer that are 0 in the end.
        epochs: after each step.
        losses, lr: of all steps; losses None: the distiller's own.

    Raises:
        ValueError: an argument is out of range.
    """
    check_sparsity(sparsity)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    shares = [sparsity * (1 - (1 - i / steps) ** 3) for i in range(1, steps + 1)]
    return [Phase(f"pruned to {share:.1%}", epochs, losses, lr, sparsity=share) for share in shares]
