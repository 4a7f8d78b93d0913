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

from kdq.distributed import distribute_as, reshard, to_save, unwrapped
from kdq.observe import device_of, evaluating, parse_batch
from kdq.ranks import batches_in_step, sum_over_ranks
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

    def warn_of_worse_teacher(self, stacklevel: int = 3) -> bool:
        """Gives a UserWarning where the student is ahead by more than two standard errors; says whether it did.

        Args:
            stacklevel: whose line the warning shows: 2, that of who calls this, and 3, the one above.
        """
        if self.lead is None or self.lead <= 2:
            return False
        warnings.warn(
            f"the teacher is worse than the student on the validation labels: accuracy {self.teacher_accuracy:.2%}, "
            f"the student's {self.accuracy:.2%}; it may hold the student back",
            UserWarning,
            stacklevel=stacklevel,
        )
        return True


def validate(student: nn.Module, teacher: nn.Module, loader: Iterable[Any]) -> Validation:
    """Runs both models, in eval mode and without gradients, over a loader's batches; where ranks train together, over
    those of all.

    Rows whose target is -100 are left out.

    Raises:
        ValueError: the loader gives no row, ranks differ in the number of batches, or the outputs' shapes differ.
    """
    student, teacher = unwrapped(student), unwrapped(teacher)
    device = device_of(student)
    tally = Tally()
    with evaluating(student, teacher), torch.no_grad():
        for batch in batches_in_step(loader, device):
            tally.add(*compared_outputs(student, teacher, parse_batch(batch, student)))
    reshard(student)
    found = tally.result(device)
    if found is None:
        raise ValueError("validation: expected at least one batch with a row that counts, got none")
    return found


class Tally:
    """What is counted over held-out batches."""

    def __init__(self) -> None:
        self.divergence, self.rows, self.unlabelled = 0.0, 0, 0
        self.right = torch.zeros(2, 2, dtype=torch.long)  # rows by whether the student is right, and the teacher

    def add(self, ours: Tensor, theirs: Tensor, target: Tensor | None) -> None:
        """Those of a batch, as from `compared_outputs`."""
        if len(ours) == 0:
            return
        self.divergence += teacher_kl(ours, theirs) * len(ours)
        self.rows += len(ours)
        if target is None:
            self.unlabelled += len(ours)
        else:
            cases = 2 * (ours.argmax(-1) == target) + (theirs.argmax(-1) == target)
            self.right += torch.bincount(cases.cpu(), minlength=4).view(2, 2)

    def result(self, device: torch.device | None) -> Validation | None:
        """Of all ranks, where they train together; None if there was no row."""
        own = [self.divergence, self.rows, self.unlabelled, *self.right.flatten().tolist()]
        divergence, rows, unlabelled, _, only_teacher, only_student, both = sum_over_ranks(own, device)
        if rows == 0:
            return None
        if unlabelled:
            return Validation(None, None, divergence / rows, None)
        lead = _lead(only_student, only_teacher, rows)
        return Validation((only_student + both) / rows, (only_teacher + both) / rows, divergence / rows, lead)


def _lead(ahead: float, behind: float, rows: float) -> float:
    """The paired difference of two 0/1 rows, 1 in `ahead` of them and -1 in `behind`, in its standard errors; infinite
    if it is the same at every row."""
    mean = (ahead - behind) / rows
    if mean == 0:
        return 0.0
    variance = (ahead + behind - rows * mean**2) / (rows - 1) if rows > 1 else math.inf
    return math.copysign(math.inf, mean) if variance <= 0 else mean / math.sqrt(variance / rows)


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
            self.weights = copy.deepcopy(self.model.state_dict())  # of this rank's shards, if there are

    def is_enough(self) -> bool:
        if self.patience is None or self.epoch is None:
            return False
        return len(self.found) - 1 - self.epoch >= self.patience

    def put_back(self) -> None:
        self.model.load_state_dict(self.weights)
        torch.clear_autocast_cache()  # an autocast around it all would go on with the weights of before

    def state_dict(self) -> dict[str, Any]:
        weights = to_save(self.weights)
        return {"found": [asdict(found) for found in self.found], "epoch": self.epoch, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.found = [Validation(**found) for found in state["found"]]
        self.epoch = state["epoch"]
        if state["weights"]:
            self.weights = {
                name: distribute_as(tensor, state["weights"][name]) for name, tensor in self.model.state_dict().items()
            }
