"""Checks, then times, the contenders of each case, interleaved so that noise hits all alike.

Each round runs every contender for about the same short time, in an order that is shuffled from round to round, after
a call that is not timed or, with several threads, after a pause and some such calls. A contender's time is the median
over the rounds, with the smallest and the largest beside it. The machine's limits are measured in the same process,
before, between and after the rounds. On a GPU all this is done with each of two clocks, see `clocks.py`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from rich.progress import Progress, TaskID

import kdq_kernels
from kdq.bench.case import Case, Contender, Role, check
from kdq.bench.clocks import Clock, DeviceClock, Timing, clocks_of
from kdq.bench.limits import LimitMeter
from kdq.bench.target import Target
from kdq.place import place_of

LIMIT_SECONDS = 0.05  # each time that a limit is measured
GPU_LIMIT_SECONDS = 0.01
ROUNDS_PER_LIMIT = 3  # the limits are measured again after so many rounds
CONTENDER_SECONDS = 1.0  # a contender whose calls take longer in all than this is made to run fewer rounds
FEWEST_ROUNDS = 2
WARM_UP_SECONDS = 0.01  # before each round of several threads
WARM_CALLS, WARM_SECONDS = 20, 0.1  # that a call's time is taken from, at most


@dataclass(frozen=True)
class Measurement:
    """One contender on one case. Times are seconds a call by the clock `timing`; `limited_by`, `rate` and
    `percent_of_limit` belong to the limit that binds the case; `error` is relative to the reference."""

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
    timing: Timing = "cpu"

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Failure:
    """A contender, or a whole family, that is left out, and why."""

    family: str
    shape: str
    contender: str
    message: str


def plan(clock: Clock, run: Callable[[], object], rounds: int) -> tuple[int, int]:
    """How many calls a round, and how many rounds: fewer where calls are so slow that they would hold up the rest.

    By the quickest of some calls: of a call that takes microseconds, one while threads wake up may take milliseconds,
    and rounds of as few calls as that allows would measure nothing but waking.
    """
    warm = clock.time_round(run, 1)
    tried = warm
    for _ in range(WARM_CALLS):
        if tried > WARM_SECONDS:
            break
        again = clock.time_round(run, 1)
        warm, tried = min(warm, again), tried + again
    calls = min(clock.most_calls, max(1, round(clock.round_seconds / max(warm, 1e-7))))
    affordable = round(CONTENDER_SECONDS / (max(warm, 1e-7) * calls))
    return calls, min(rounds, max(FEWEST_ROUNDS, affordable))


def warm_up(clock: Clock, run: Callable[[], object], seconds: float) -> None:
    """At least one call, and as many as take so long: threads that slept wake up on the same CPU at times, and it takes
    milliseconds until they are moved apart."""
    spent = clock.time_round(run, 1)
    while spent < seconds:
        spent += clock.time_round(run, 1)


def time_interleaved(
    clock: Clock, contenders: Sequence[Contender], rounds: int, meter: LimitMeter
) -> list[list[float]]:
    """A list of times for each contender, one a round; the limits are measured in between."""
    plans = [plan(clock, contender.run, rounds) for contender in contenders]
    times: list[list[float]] = [[] for _ in contenders]
    shuffle = random.Random(0)
    pause = clock.pause if meter.threads > 1 else 0.0
    for r in range(rounds):
        if r % ROUNDS_PER_LIMIT == 0:
            time.sleep(pause)
            meter.measure()
        for which in shuffle.sample(range(len(contenders)), len(contenders)):
            calls, limit = plans[which]
            if r < limit:
                time.sleep(pause)
                if calls > 1:
                    warm_up(clock, contenders[which].run, min(pause, WARM_UP_SECONDS))
                times[which].append(clock.time_round(contenders[which].run, calls))
    time.sleep(pause)
    meter.measure()
    return times


def checked(case: Case, keep_going: bool) -> tuple[list[tuple[Contender, float]], list[Failure]]:
    """The contenders whose results are right, with their errors, and the others.

    Raises:
        RuntimeError, ValueError: one is wrong, or does not run, and that is not to be gone on from.
    """
    right: list[tuple[Contender, float]] = []
    failures: list[Failure] = []
    for contender in case.contenders:
        try:
            right.append((contender, check(case, contender)))
        except (RuntimeError, ValueError) as error:
            if not keep_going:
                raise
            failures.append(Failure(case.family, case.shape, contender.name, str(error)))
    return right, failures


def measure(
    case: Case, contenders: Sequence[tuple[Contender, float]], clock: Clock, meter: LimitMeter, rounds: int
) -> list[Measurement]:
    """Times the contenders of a case, given with their errors."""
    times = time_interleaved(clock, [contender for contender, _ in contenders], rounds, meter)
    limit, limit_rate = meter.binding()
    medians = [statistics.median(t) for t in times]
    peer_times = [m for m, (c, _) in zip(medians, contenders, strict=True) if c.role == "peer"]
    results = []
    for (contender, error), samples, median in zip(contenders, times, medians, strict=True):
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
                timing=clock.timing,
            )
        )
    return results


@dataclass
class Runner:
    """Runs families on a target, and collects what they give beside their measurements."""

    target: Target
    clocks: Sequence[Clock]
    rounds: int
    keep_going: bool
    on_result: Callable[[list[Measurement]], None] | None
    limits: list[dict[str, object]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def run_family(
        self, name: str, cases: Callable[[Target], Iterable[Case]], threads: int, tell: Callable[[str], None]
    ) -> list[Measurement]:
        """All cases by one clock, then by the next. tell: gets the shape of the case that is run."""
        by_clock: dict[Timing, list[Measurement]] = {clock.timing: [] for clock in self.clocks}
        try:
            for case in cases(self.target):
                tell(case.shape)
                for clock, results in zip(self.clocks, self.run_case(case, threads), strict=True):
                    by_clock[clock.timing] += results
                    if self.on_result is not None:
                        self.on_result(results)
        except (RuntimeError, ValueError) as error:
            if not self.keep_going:
                raise
            self.failures.append(Failure(name, "", "", str(error)))
        return list(itertools.chain.from_iterable(by_clock.values()))

    def run_case(self, case: Case, threads: int) -> list[list[Measurement]]:
        """By each clock; keeps the limits found beside it."""
        contenders, failures = checked(case, self.keep_going)
        self.failures += failures
        seconds = LIMIT_SECONDS if self.target.device.type == "cpu" else GPU_LIMIT_SECONDS
        about = {"family": case.family, "shape": case.shape, "threads": threads}
        results = []
        for clock in self.clocks:
            meter = LimitMeter(case.limits, threads, seconds / 5 if self.target.quick else seconds, self.target.device)
            results.append(measure(case, contenders, clock, meter, self.rounds))
            self.limits += [{**about, **found} for found in meter.describe()]
        return results


def run_bench(
    families: Iterable[str] | None = None,
    *,
    threads: Sequence[int] = (1,),
    rounds: int = 9,
    quick: bool = False,
    device: str = "cpu",
    keep_going: bool = False,
    on_result: Callable[[list[Measurement]], None] | None = None,
) -> tuple[list[Measurement], dict[str, object]]:
    """Runs the benchmark families by name (None: all).

    Args:
        threads: one run of every family for each of these, for torch and for our kernels alike; of a CPU.
        quick: small shapes and few rounds, to see that everything works; not for figures.
        device: "cpu", or a GPU as torch names it.
        keep_going: notes what is wrong or does not run, and goes on.
        on_result: called after each case, on a GPU with the results of each clock.

    Returns:
        All measurements, and the machine: build info, torch version, the limits measured beside each case, failures.

    Raises:
        ValueError: a family is unknown, a number out of range, or a contender refuses its arguments.
        RuntimeError: a contender is wrong or does not run, or there is no such GPU or no operators for it.
    """
    from kdq.bench.families import FAMILIES

    names = list(FAMILIES) if families is None else list(families)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise ValueError(f"family: expected some of {', '.join(FAMILIES)}, got {', '.join(unknown)}")
    check_threads(threads)
    target = Target.of(place_of(device), quick)
    if target.gpu and list(threads) != [1]:
        raise ValueError(f"threads: expected none with device {device}, got {list(threads)}")
    measurements: list[Measurement] = []
    with torch_threads(), torch.inference_mode(), current(target), Progress(transient=True) as progress:
        clocks = clocks_of(target.device)
        runner = Runner(target, clocks, min(rounds, 3) if quick else rounds, keep_going, on_result)
        task = progress.add_task("benchmarks", total=len(names) * len(threads))
        for name, count in itertools.product(names, threads):
            torch.set_num_threads(count)
            tell = partial(describe_task, progress, task, name, count)
            measurements += runner.run_family(name, FAMILIES[name], count, tell)
            progress.advance(task)
        return measurements, describe_machine(runner)


def describe_task(progress: Progress, task: TaskID, family: str, threads: int, shape: str) -> None:
    progress.update(task, description=f"{family} {shape}, threads: {threads}")


def current(target: Target) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the one on which torch works."""
    return torch.cuda.device(target.device) if target.gpu else contextlib.nullcontext()


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


def describe_machine(runner: Runner) -> dict[str, object]:
    return {
        **kdq_kernels.build_info(),
        "isa": kdq_kernels.cpu_isa(),
        "best_isa": kdq_kernels.available_isas()[-1],
        "torch": torch.__version__,
        "peers": peer_versions(),
        "limits": runner.limits,
        "failures": [asdict(failure) for failure in runner.failures],
        **describe_device(runner),
    }


def describe_device(runner: Runner) -> dict[str, object]:
    if runner.target.device.type == "cpu":
        return {"device": "cpu"}
    found = torch.cuda.get_device_properties(runner.target.device)
    (empty,) = (clock.empty() for clock in runner.clocks if isinstance(clock, DeviceClock))
    return {
        "device": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cuda": torch.version.cuda,
        "empty_kernel_seconds": empty,
    }


def peer_versions() -> dict[str, str]:
    """The optional peers that are installed."""
    versions = {}
    for name in ("onnxruntime", "openvino", "torchao"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
