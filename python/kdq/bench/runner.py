"""Checks, then times, the contenders of each case, interleaved so that noise hits all alike.

Each round runs every contender for about the same short time, in an order that is shuffled from round to round, after
a pause in which the thread pool of the one before goes to sleep and after one call that is not timed. A contender's
time is the median over the rounds, with the smallest and the largest beside it. The machine's limits are measured in
the same process, before, between and after the rounds.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.progress import Progress

import kdq_kernels
from kdq.bench.case import Case, Contender, Role, check
from kdq.bench.limits import LimitMeter

ROUND_SECONDS = 0.02
PAUSE_SECONDS = 0.01
LIMIT_SECONDS = 0.05  # each time that a limit is measured
ROUNDS_PER_LIMIT = 3  # the limits are measured again after so many rounds
CONTENDER_SECONDS = 1.0  # a contender whose calls take longer in all than this is made to run fewer rounds
FEWEST_ROUNDS = 2


@dataclass(frozen=True)
class Measurement:
    """One contender on one case. Times are seconds a call; `limited_by`, `rate` and `percent_of_limit` belong to the
    limit that binds the case; `error` is relative to the reference."""

    family: str
    shape: str
    contender: str
    role: Role
    threads: int
    median: float
    fastest: float
    slowest: float
    rate: float
    unit: str
    limited_by: str
    percent_of_limit: float
    ratio_to_best_peer: float | None
    error: float

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def time_round(run: Callable[[], object], calls: int) -> float:
    """Seconds a call, averaged over `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def plan(run: Callable[[], object], rounds: int) -> tuple[int, int]:
    """How many calls a round, and how many rounds: fewer where calls are so slow that they would hold up the rest."""
    warm = time_round(run, 1)
    if warm < CONTENDER_SECONDS / 2:
        warm = min(warm, time_round(run, 1))
    calls = max(1, round(ROUND_SECONDS / max(warm, 1e-7)))
    affordable = round(CONTENDER_SECONDS / (warm * calls))
    return calls, min(rounds, max(FEWEST_ROUNDS, affordable))


def time_interleaved(contenders: Sequence[Contender], rounds: int, meter: LimitMeter) -> list[list[float]]:
    """A list of times for each contender, one a round; the limits are measured in between."""
    plans = [plan(contender.run, rounds) for contender in contenders]
    times: list[list[float]] = [[] for _ in contenders]
    shuffle = random.Random(0)
    for r in range(rounds):
        if r % ROUNDS_PER_LIMIT == 0:
            time.sleep(PAUSE_SECONDS)
            meter.measure()
        for which in shuffle.sample(range(len(contenders)), len(contenders)):
            calls, limit = plans[which]
            if r < limit:
                time.sleep(PAUSE_SECONDS)
                if calls > 1:
                    time_round(contenders[which].run, 1)
                times[which].append(time_round(contenders[which].run, calls))
    time.sleep(PAUSE_SECONDS)
    meter.measure()
    return times


def measure(case: Case, meter: LimitMeter, rounds: int) -> list[Measurement]:
    """Checks and times one case."""
    errors = [check(case, contender) for contender in case.contenders]
    times = time_interleaved(case.contenders, rounds, meter)
    limit, limit_rate = meter.binding()
    medians = [statistics.median(t) for t in times]
    peer_times = [m for m, c in zip(medians, case.contenders, strict=True) if c.role == "peer"]
    results = []
    for contender, error, samples, median in zip(case.contenders, errors, times, medians, strict=True):
        rate = limit.amount / median / 1e9
        ours = contender.role == "ours"
        results.append(
            Measurement(
                family=case.family,
                shape=case.shape,
                contender=contender.name,
                role=contender.role,
                threads=meter.threads,
                median=median,
                fastest=min(samples),
                slowest=max(samples),
                rate=rate,
                unit=limit.unit,
                limited_by=limit.name,
                percent_of_limit=100 * rate / limit_rate,
                ratio_to_best_peer=min(peer_times) / median if ours and peer_times else None,
                error=error,
            )
        )
    return results


def run_case(case: Case, threads: int, rounds: int, quick: bool) -> tuple[list[Measurement], list[dict[str, object]]]:
    """One case's measurements, and the limits found beside it."""
    meter = LimitMeter(case.limits, threads, LIMIT_SECONDS / 5 if quick else LIMIT_SECONDS)
    results = measure(case, meter, rounds)
    about = {"family": case.family, "shape": case.shape, "threads": threads}
    limits = [{**about, "limit": k.name, "peak": k.peak, "rate": r, "unit": k.unit} for k, r in meter.rates.items()]
    return results, limits


def run_bench(
    families: Iterable[str] | None = None,
    *,
    threads: Sequence[int] = (1,),
    rounds: int = 9,
    quick: bool = False,
    on_result: Callable[[list[Measurement]], None] | None = None,
) -> tuple[list[Measurement], dict[str, object]]:
    """Runs the benchmark families by name (None: all).

    Args:
        threads: one run of every family for each of these, for torch and for our kernels alike.
        quick: small shapes and few rounds, to see that everything works; not for figures.
        on_result: called after each case.

    Returns:
        All measurements, and the machine: build info, torch version, the limits measured beside each case.
    """
    from kdq.bench.families import FAMILIES

    names = list(FAMILIES) if families is None else list(families)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise ValueError(f"family: expected some of {', '.join(FAMILIES)}, got {', '.join(unknown)}")
    check_threads(threads)
    measurements: list[Measurement] = []
    limits: list[dict[str, object]] = []
    with torch_threads(), torch.inference_mode(), Progress(transient=True) as progress:
        task = progress.add_task("benchmarks", total=len(names) * len(threads))
        for name, count in itertools.product(names, threads):
            torch.set_num_threads(count)
            for case in FAMILIES[name](quick):
                progress.update(task, description=f"{name} {case.shape}, threads: {count}")
                results, found = run_case(case, count, min(rounds, 3) if quick else rounds, quick)
                measurements += results
                limits += found
                if on_result is not None:
                    on_result(results)
            progress.advance(task)
    return measurements, describe_machine(limits)


def check_threads(threads: Sequence[int]) -> None:
    if not threads or min(threads) < 1:
        raise ValueError(f"threads: expected numbers of at least 1, got {list(threads)}")


@contextlib.contextmanager
def torch_threads() -> Iterator[None]:
    """Restores torch's number of threads afterwards."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_machine(limits: list[dict[str, object]]) -> dict[str, object]:
    return {
        **kdq_kernels.build_info(),
        "isa": kdq_kernels.cpu_isa(),
        "torch": torch.__version__,
        "peers": peer_versions(),
        "limits": limits,
    }


def peer_versions() -> dict[str, str]:
    """The optional peers that are installed."""
    versions = {}
    for name in ("onnxruntime", "openvino", "torchao"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
