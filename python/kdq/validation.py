"""What a fit looks at after each epoch: the student on held-out batches, its best weights, a teacher that is worse."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdq.observe import evaluating, parse_batch
from kdq.reporting import compared_outputs, teacher_kl


@dataclass(frozen=True)
class Validation:
    """Both models on held-out batches.

    Attributes:
        accuracy, teacher_accuracy: shares of right rows, or None without labels.
        teacher_kl: KL(teacher || student), mean over the rows, in nats.
        lead: by how much the student is ahead of the teacher in accuracy, in standard errors of the paired difference
            over the rows; None without labels.
    """

    accuracy: float | None
    teacher_accuracy: float | None
    teacher_kl: float
    lead: float | None

    def values(self) -> dict[str, float]:
        """What a log is told: without what there is not."""
        values = {name: getattr(self, name) for name in ("accuracy", "teacher_accuracy", "teacher_kl")}
        return {name: value for name, value in values.items() if value is not None}

    def better_than(self, other: Validation) -> bool:
        """By accuracy, if there are labels; then by KL to the teacher."""
        return (self.accuracy or 0.0, -self.teacher_kl) > (other.accuracy or 0.0, -other.teacher_kl)

    def warn_of_worse_teacher(self) -> bool:
        """Gives a UserWarning where the student is ahead by more than two standard errors; says whether it did."""
        if self.lead is None or self.lead <= 2:
            return False
        warnings.warn(
            f"the teacher is worse than the student on the validation labels: accuracy {self.teacher_accuracy:.2%}, "
            f"the student's {self.accuracy:.2%}; it may hold the student back",
            UserWarning,
            stacklevel=3,
        )
        return True


def validate(student: nn.Module, teacher: nn.Module, loader: Iterable[Any]) -> Validation:
    """Runs both models, in eval mode and without gradients, over a loader's batches.

    Rows whose target is -100 are left out.

    Raises:
        ValueError: the loader gives no row, or the outputs' shapes differ.
    """
    divergence, rows, labelled = 0.0, 0, True
    right: list[Tensor] = []  # [2, rows] a batch: student, teacher
    with evaluating(student, teacher), torch.no_grad():
        for batch in loader:
            ours, theirs, target = compared_outputs(student, teacher, parse_batch(batch, student))
            if len(ours) == 0:
                continue
            divergence += teacher_kl(ours, theirs) * len(ours)
            rows += len(ours)
            if target is None:
                labelled = False
            else:
                right.append(torch.stack([ours.argmax(-1) == target, theirs.argmax(-1) == target]).double().cpu())
    if rows == 0:
        raise ValueError("validation: expected at least one batch with a row that counts, got none")
    if not labelled:
        return Validation(None, None, divergence / rows, None)
    student_right, teacher_right = torch.cat(right, 1)
    return Validation(
        float(student_right.mean()), float(teacher_right.mean()), divergence / rows, _lead(student_right, teacher_right)
    )


def _lead(student: Tensor, teacher: Tensor) -> float:
    """The paired difference of two 0/1 rows in its standard errors; infinite if it is the same at every row."""
    difference = student - teacher
    mean = float(difference.mean())
    if mean == 0:
        return 0.0
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    return math.copysign(math.inf, mean) if error == 0 else mean / error


class BestWeights:
    """What the epochs' validations found, and the weights of the best of them.

    Args:
        patience: so many epochs without a better one are enough. None: no weights are kept.
    """

    def __init__(self, model: nn.Module, patience: int | None) -> None:
        self.model = model
        self.patience = patience
        self.found: list[Validation] = []
        self.epoch: int | None = None
        self.weights: dict[str, Any] = {}

    def see(self, validation: Validation) -> None:
        """One after each epoch, while the model has the weights that it is of."""
        self.found.append(validation)
        if self.patience is None:
            return
        if self.epoch is None or validation.better_than(self.found[self.epoch]):
            self.epoch = len(self.found) - 1
            self.weights = copy.deepcopy(self.model.state_dict())

    def is_enough(self) -> bool:
        if self.patience is None or self.epoch is None:
            return False
        return len(self.found) - 1 - self.epoch >= self.patience

    def put_back(self) -> None:
        self.model.load_state_dict(self.weights)
        torch.clear_autocast_cache()  # an autocast around it all would go on with the weights of before

    def state_dict(self) -> dict[str, Any]:
        return {"found": [asdict(found) for found in self.found], "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.found = [Validation(**found) for found in state["found"]]
        self.epoch, self.weights = state["epoch"], state["weights"]
