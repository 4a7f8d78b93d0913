"""The exact choice: one option a layer, least summed sensitivity within the budgets (a multiple-choice knapsack).

Solved as an integer programme by HiGHS (`scipy.optimize.milp`). Among equally good choices the smallest is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Rows = Sequence[Sequence[float]]  # one row a layer, one value an option

SCALE = 1e4  # of the objective and the rows: HiGHS's gap and tolerances are absolute, 1e-6
TOLERANCE = 1e-9  # of sums of sensitivities, relative to the largest: what counts as equal
SUM_ERROR = 1e-12  # of sums that are compared with a bound: rounding of float costs, less than a byte


@dataclass(frozen=True)
class Limit:
    """The sum of `costs` over the choices, plus `fixed`, may not exceed `bound`."""

    name: str
    costs: Rows
    bound: float
    fixed: float = 0.0

    @property
    def slack(self) -> float:
        return SUM_ERROR * max(1.0, abs(self.bound))

    def total(self, choice: Sequence[int]) -> float:
        return self.fixed + chosen_sum(self.costs, choice)


def chosen_sum(costs: Rows, choice: Sequence[int]) -> float:
    return math.fsum(row[i] for row, i in zip(costs, choice, strict=True))


def solve(sensitivity: Rows, sizes: Rows, limits: Sequence[Limit]) -> list[int]:
    """The option of each layer.

    Raises:
        ValueError: no choice meets the limits; the message names the smallest value that can be reached.
    """
    for limit in limits:
        least = limit.fixed + math.fsum(min(row) for row in limit.costs)
        if least > limit.bound + limit.slack:
            raise ValueError(f"budget: {limit.name}={limit.bound:g} cannot be met, the smallest is {_upward(least)}")
    best = _minimise(sensitivity, limits)
    if best is None:
        first, *others = limits
        reached = _minimise(first.costs, others)
        if reached is None:
            names = ", ".join(f"{limit.name}={limit.bound:g}" for limit in limits)
            raise ValueError(f"budget: no plan meets {names} together, each alone can be met")
        raise ValueError(
            f"budget: {first.name}={first.bound:g} cannot be met together with "
            f"{', '.join(f'{limit.name}={limit.bound:g}' for limit in others)}, the smallest is "
            f"{_upward(first.total(reached))}"
        )
    largest = max((abs(v) for row in sensitivity for v in row), default=0.0)
    equal = Limit("sensitivity", sensitivity, chosen_sum(sensitivity, best) + TOLERANCE * largest)
    smallest = _minimise(sizes, [*limits, equal])
    return best if smallest is None else smallest


def _upward(value: float) -> str:
    """Six digits, rounded so that asking for that value works."""
    digits = max(0, 6 - math.ceil(math.log10(value))) if value > 0 else 6
    return f"{math.ceil(round(value * 10**digits, 6)) / 10**digits:.{digits}f}"


def _minimise(objective: Rows, limits: Sequence[Limit]) -> list[int] | None:
    """The choice with the least objective; None if none meets the limits."""
    counts = [len(row) for row in objective]
    size = sum(counts)
    layer = np.repeat(np.arange(len(counts)), counts)
    weights = _above_least(objective)
    one_each = LinearConstraint((layer == np.arange(len(counts))[:, None]).astype(float), 1, 1)
    rooms = [limit.bound + limit.slack - limit.fixed - sum(min(row) for row in limit.costs) for limit in limits]
    if any(room < 0 for room in rooms):
        return None
    constraints = [one_each]
    upper = np.ones(size)
    for limit, room in zip(limits, rooms, strict=True):
        costs = _above_least(limit.costs)
        upper[costs > room] = 0
        unit = _unit(costs)
        constraints.append(LinearConstraint(costs[None] / unit, -np.inf, room / unit))
    while True:
        result = milp(
            weights / _unit(weights),
            integrality=np.ones(size),
            bounds=Bounds(np.zeros(size), upper),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if result.status == 2:
            return None
        if result.x is None:
            raise RuntimeError(f"the solver failed: {result.message}")
        choice = [int(part.argmax()) for part in np.split(result.x, np.cumsum(counts)[:-1])]
        if all(limit.total(choice) <= limit.bound + limit.slack for limit in limits):
            return choice
        # The solver's tolerances let a sum exceed its bound by a hair: ask again, without that choice.
        picked = np.concatenate([np.arange(n) == i for n, i in zip(counts, choice, strict=True)])
        constraints.append(LinearConstraint(picked[None].astype(float), -np.inf, len(counts) - 1))


def _above_least(rows: Rows) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """All values in one row, less the least of their layer: one is chosen anyway, so only differences count."""
    return np.concatenate([np.asarray(row, dtype=np.float64) - min(row) for row in rows])


def _unit(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """What to divide by, so that the largest becomes SCALE."""
    largest = float(values.max())
    return largest / SCALE if largest > 0 else 1.0
