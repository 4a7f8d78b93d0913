"""pytest-benchmark over the cases of `kdq.bench`: `python -m pytest benchmarks --benchmark-enable`.

Every contender is checked against the case's reference before it is timed. For figures to quote, use `kdq bench`, which
interleaves the contenders and measures the machine's limits in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from kdq.bench.case import Case, Contender, check
from kdq.bench.target import Target


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the shapes of the published results, not the small ones")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def run_family(
    request: pytest.FixtureRequest, benchmark: Any
) -> Callable[[Callable[[Target], Iterable[Case]], str], None]:
    """Benchmarks the contender of that name on every case of a family that has it."""

    def run(family: Callable[[Target], Iterable[Case]], name: str) -> None:
        target = Target(quick=not request.config.getoption("--full"))
        found: list[tuple[Case, Contender]] = [
            (case, contender) for case in family(target) for contender in case.contenders if contender.name == name
        ]
        if not found:
            pytest.skip(f"{name} does not run here")
        for case, contender in found:
            check(case, contender)
        benchmark.group = f"{found[0][0].family} ({len(found)} shapes a round)"
        benchmark(lambda: [contender.run() for _, contender in found])

    return run
