"""Teachers made of other models: several at once, and the student's own float self."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.layers.base import InferenceLayer
from kdq.layers.qat import TrainingTwin
from kdq.observe import logits_of


class TeacherEnsemble(nn.Module):
    """Several teachers as one, whose logits are those of their average; hints name "teachers.0.layer".

    Args:
        teachers: models with logits of one shape; all get the same arguments.
        weights: positive, one a teacher; they are divided by their sum. None: all the same.
        average: "probabilities": the log of the weighted mean of the softmax at temperature 1 (Hinton, Vinyals, Dean:
            Distilling the Knowledge in a Neural Network, 2015); "logits": the weighted mean of the logits, which is the
            geometric mean of the distributions.

    Raises:
        ValueError: there is no teacher, or weights or average are not as above.
    """

    weights: Tensor

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        average: Literal["probabilities", "logits"] = "probabilities",
    ) -> None:
        super().__init__()
        if not teachers:
            raise ValueError("teachers: expected at least one, got none")
        if average not in ("probabilities", "logits"):
            raise ValueError(f'average: expected "probabilities" or "logits", got {average!r}')
        shares = [1.0] * len(teachers) if weights is None else [float(w) for w in weights]
        if len(shares) != len(teachers) or not all(w > 0 and math.isfinite(w) for w in shares):
            raise ValueError(f"weights: expected {len(teachers)} positive finite numbers, got {weights!r}")
        self.teachers = nn.ModuleList(teachers)
        self.average = average
        self.register_buffer("weights", torch.tensor([w / sum(shares) for w in shares]))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits `[..., C]`, at least float32.

        Raises:
            ValueError: the teachers' logits differ in shape.
        """
        logits = [logits_of(teacher(*args, **kwargs), f"teacher {i}") for i, teacher in enumerate(self.teachers)]
        if len({tuple(x.shape) for x in logits}) != 1:
            raise ValueError(f"teachers: expected logits of one shape, got {[list(x.shape) for x in logits]}")
        stacked = torch.stack([x.to(torch.promote_types(x.dtype, torch.float32)) for x in logits], -1)
        if self.average == "logits":
            return (stacked * self.weights).sum(-1)
        return (F.log_softmax(stacked, -2) + self.weights.log()).logsumexp(-1)

    def extra_repr(self) -> str:
        return f"average={self.average!r}"


def self_teacher(model: nn.Module) -> nn.Module:
    """A frozen copy of a float model in eval mode: the teacher of its own low-bit self.

    With `SoftTargets(alpha=1)` no labels are needed. Call it before `prepare_qat_`.

    Raises:
        ValueError: a layer of the model is already quantized or prepared.
    """
    for name, module in model.named_modules():
        if isinstance(module, TrainingTwin | InferenceLayer):
            raise ValueError(
                f"model: {name!r} is already a {type(module).__name__}; call self_teacher before prepare_qat_"
            )
    return copy.deepcopy(model).eval().requires_grad_(False)
