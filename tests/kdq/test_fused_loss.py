"""Which losses run the fused kernel op `distillation_loss`, and which are composed, with the same value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdq
from small_models import TWO, mlp, randn

STUDENT, TEACHER = randn(9, 5) * 3, randn(9, 5, seed=1) * 3
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, -100, 2])


class Ops(TorchDispatchMode):
    """Counts calls of the fused op and of torch's log-softmax, of which composed losses are made."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.composed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += func is torch.ops.kdq.distillation_loss.default
        self.composed += func is torch.ops.aten._log_softmax.default
        return func(*args, **(kwargs or {}))


def ops_of(loss: Any, student: Tensor, teacher: Tensor, target: Tensor | None) -> tuple[bool, bool, float]:
    """Whether the fused op ran, whether a composed loss did, and the value."""
    with Ops() as ops:
        value = float(loss(student, teacher, target))
    return ops.fused == 1, ops.composed > 0, value


@pytest.mark.parametrize(
    "dtypes", [("float32",) * 2, ("bfloat16",) * 2, ("float16",) * 2, ("bfloat16", "float32")], ids=str
)
@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (kdq.SoftTargets(), None),
        (kdq.SoftTargets(T=2.0, alpha=0.3), LABELS),
        (kdq.SoftTargets(alpha=0.0), LABELS),
        (kdq.CrossEntropy(), LABELS),
    ],
    ids=str,
)
def test_where_the_kernel_fits_it_runs(loss: Any, target: Tensor | None, dtypes: tuple[str, str]) -> None:
    """On the CPU in 32 and 16 bits. float64 does not fit: it is composed, and has the same value."""
    student, teacher = (x.to(getattr(torch, d)) for x, d in zip((STUDENT, TEACHER), dtypes, strict=True))
    fused, composed, value = ops_of(loss, student, teacher, target)
    assert (fused, composed) == (True, False)
    fused, composed, expected = ops_of(loss, student.double(), teacher.double(), target)
    assert (fused, composed) == (False, True)
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "same"),
    [
        # Rows of mean 0 and deviation 1 are what they are standardized to.
        (kdq.SoftTargets(standardize=True), lambda s, t, y: kdq.SoftTargets()(s, t, y)),
        (kdq.SoftTargets(divergence="reverse"), lambda s, t, y: kdq.SoftTargets()(t, s, y)),
        (kdq.CrossEntropy(label_smoothing=1e-9), kdq.CrossEntropy()),
    ],
    ids=["standardize", "reverse", "smoothing"],
)
def test_forms_that_the_kernel_does_not_have_are_composed(loss: Any, same: Any) -> None:
    student, teacher = ((x - x.mean(1, True)) / x.std(1, keepdim=True, correction=0) for x in (STUDENT, TEACHER))
    fused, composed, value = ops_of(loss, student, teacher, LABELS)
    assert (fused, composed) == (False, True)
    fused, _, expected = ops_of(same, student, teacher, LABELS)
    assert fused
    assert value == pytest.approx(expected, rel=1e-4)


def test_a_distiller_reaches_the_kernel_once_a_step() -> None:
    """Also with a student on integers, and backward."""
    student = mlp(5, seed=1)
    kdq.prepare_qat_(student, TWO)
    distiller = kdq.Distiller(mlp(8), student, [kdq.SoftTargets(alpha=0.5)])
    with Ops() as ops:
        distiller.fit([(randn(6, 6), torch.arange(6) % 4)] * 3, 1, progress=False)
    assert (ops.fused, ops.composed) == (3, 0)
