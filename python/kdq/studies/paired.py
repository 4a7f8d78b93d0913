"""Paired comparisons: what an arm gains over another on the same seeds, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SURE = 3.0  # standard errors from which on a difference counts as shown


@dataclass(frozen=True)
class Outcome:
    """One arm of one seed. `values` by metric: accuracy in percent, teacher_kl in nats, or what a study measures."""

    task: str
    group: str  # arms are compared within a group: a precision, a budget
    arm: str
    seed: int
    values: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """Mean and standard error of `arm - against` over the seeds, with the means of the two."""

    arm: float
    against: float
    mean: float
    error: float
    seeds: int

    @property
    def sigmas(self) -> float:
        """The mean in standard errors; infinite where all seeds agree exactly, NaN for one seed."""
        if self.error == 0:
            return math.copysign(math.inf, self.mean) if self.mean else 0.0
        return self.mean / self.error

    def verdict(self, better: int) -> str:
        """better: +1 where more is better, -1 where less is."""
        gain = self.sigmas * better
        if math.isnan(gain):
            return "one seed"
        if gain >= SURE:
            return "better"
        return "worse" if gain <= -SURE else "not shown"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean (NaN for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def compare(outcomes: Sequence[Outcome], task: str, group: str, arm: str, against: str, metric: str) -> Difference:
    """The paired difference of two arms.

    Raises:
        ValueError: an arm lacks seeds that the other has, or both have none.
    """
    by_arm = [
        {o.seed: o.values[metric] for o in outcomes if (o.task, o.group, o.arm) == (task, group, name)}
        for name in (arm, against)
    ]
    ours, theirs = by_arm
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(
            f"{task}, {group}: expected the same seeds for {arm!r} and {against!r}, "
            f"got {sorted(ours)} and {sorted(theirs)}"
        )
    mean, error = mean_and_error([ours[seed] - theirs[seed] for seed in sorted(ours)])
    return Difference(
        arm=statistics.fmean(ours.values()),
        against=statistics.fmean(theirs.values()),
        mean=mean,
        error=error,
        seeds=len(ours),
    )
