"""What is benchmarked: a case is one shape of one kernel family, a contender one way of computing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdq.bench.limits import Limit

Role = Literal["ours", "peer", "context"]


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: as shown in the table.
        run: computes the result once; everything that need not be repeated is done before.
        role: "ours"; "peer": does the same job, and counts in the ratio; "context": a different precision or job,
            shown only.
        tolerance: largest accepted `|result - reference| / |reference|` (Frobenius norms); 0 demands equality.
    """

    name: str
    run: Callable[[], Tensor]
    role: Role = "peer"
    tolerance: float = 0.0


@dataclass(frozen=True)
class Case:
    """One shape of one family.

    Attributes:
        limits: the operations and the bytes of one call, each the least that the job takes; the one that takes this
            machine the longest is what the case is held against.
        reference: the right result, computed another way.
    """

    family: str
    shape: str
    limits: Sequence[Limit]
    reference: Tensor
    contenders: Sequence[Contender]


def relative_error(result: Tensor, reference: Tensor) -> float:
    """`|result - reference| / |reference|` in float64; infinite where anything is NaN or the shapes differ."""
    if result.shape != reference.shape:
        return float("inf")
    if result.dtype == reference.dtype and torch.equal(result, reference):
        return 0.0  # spares large tensors the copies below
    difference = torch.linalg.vector_norm(result.double() - reference.double())
    norm = torch.linalg.vector_norm(reference.double())
    error = float(difference / norm) if norm > 0 else float(difference)
    return error if error == error else float("inf")


def check(case: Case, contender: Contender) -> float:
    """Runs a contender once and returns its relative error.

    Raises:
        RuntimeError: the result is further from the reference than the contender's tolerance.
    """
    error = relative_error(contender.run(), case.reference)
    if error > contender.tolerance:
        raise RuntimeError(
            f"{case.family} {case.shape}: {contender.name} is wrong: relative error {error:.3g}, "
            f"accepted {contender.tolerance:.3g}; it is not timed"
        )
    return error
