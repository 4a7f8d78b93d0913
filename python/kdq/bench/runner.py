"""Checks, then times, the contenders of each case, interleaved so that noise hits all alike.

Each round runs every contender for about the same short time, in an order that is shuffled from round to round, after
a pause in which the thread pool of the one before goes to sleep and after one call that is not timed. A contender's
time is the median over the rounds, with the smallest and the largest beside it. The machine's peaks are measured in the
same process, before each case.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.progress import Progress

import kdq_kernels
from kdq.bench.case import Case, Contender, Role, check

ROUND_SECONDS = 0.02
PAUSE_SECONDS = 0.01
SLOW_SECONDS = 0.5  # a call that takes longer is made in fewer rounds


@dataclass(frozen=True)
class Measurement:
    """One contender on one case. Times are seconds a call; `rate` is Gop/s or GB/s; `error` is relative to the
    reference."""

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
    percent_of_peak: float
    ratio_to_best_peer: float | None
    error: float

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def time_round(contender: Contender, calls: int) -> float:
    """Seconds a call, averaged over `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        contender.run()
    return (time.perf_counter() - start) / calls


def time_interleaved(contenders: Sequence[Contender], rounds: int) -> list[list[float]]:
    """A list of times for each contender: `rounds` of them, fewer (at least 3) for one so slow that it would hold up
    the rest."""
    calls, limits = [], []
    for contender in contenders:
        warm = time_round(contender, 1)
        if warm < SLOW_SECONDS:
            warm = min(warm, time_round(contender, 1))
        calls.append(max(1, round(ROUND_SECONDS / max(warm, 1e-7))))
        limits.append(min(rounds, max(3, round(SLOW_SECONDS / warm * rounds))))
    times: list[list[float]] = [[] for _ in contenders]
    shuffle = random.Random(0)
    for r in range(rounds):
        for which in shuffle.sample(range(len(contenders)), len(contenders)):
            if r < limits[which]:
                time.sleep(PAUSE_SECONDS)
                if calls[which] > 1:
                    time_round(contenders[which], 1)
                times[which].append(time_round(contenders[which], calls[which]))
    return times


def measure(case: Case, peaks: kdq_kernels.cpu.MachinePeaks, rounds: int) -> list[Measurement]:
    """Checks and times one case."""
    errors = [check(case, contender) for contender in case.contenders]
    times = time_interleaved(case.contenders, rounds)
    medians = [statistics.median(t) for t in times]
    peer_times = [m for m, c in zip(medians, case.contenders, strict=True) if c.role == "peer"]
    results = []
    for contender, error, samples, median in zip(case.contenders, errors, times, medians, strict=True):
        rate = case.work / median / 1e9
        ours = contender.role == "ours"
        results.append(
            Measurement(
                family=case.family,
                shape=case.shape,
                contender=contender.name,
                role=contender.role,
                threads=peaks["threads"],
                median=median,
                fastest=min(samples),
                slowest=max(samples),
                rate=rate,
                unit="GB/s" if case.peak == "copy_gbps" else "Gop/s",
                percent_of_peak=100 * rate / peaks[case.peak],
                ratio_to_best_peer=min(peer_times) / median if ours and peer_times else None,
                error=error,
            )
        )
    return results


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
        All measurements, and the machine: build info, torch version, the peaks measured before each case.
    """
    from kdq.bench.families import FAMILIES

    names = list(FAMILIES) if families is None else list(families)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise ValueError(f"family: expected some of {', '.join(FAMILIES)}, got {', '.join(unknown)}")
    if not threads or min(threads) < 1:
        raise ValueError(f"threads: expected numbers of at least 1, got {list(threads)}")
    before = torch.get_num_threads()
    measurements: list[Measurement] = []
    all_peaks: list[dict[str, object]] = []
    try:
        with torch.inference_mode(), Progress(transient=True) as progress:
            task = progress.add_task("benchmarks", total=len(names) * len(threads))
            for name, count in itertools.product(names, threads):
                progress.update(task, description=f"{name}, threads: {count}")
                torch.set_num_threads(count)
                for case in FAMILIES[name](quick):
                    seconds = 0.02 if quick else 0.1
                    peaks = kdq_kernels.machine_peaks(count, copy_bytes=copy_bytes(case), seconds=seconds)
                    all_peaks.append({"family": name, "shape": case.shape, **peaks})
                    results = measure(case, peaks, min(rounds, 3) if quick else rounds)
                    measurements += results
                    if on_result is not None:
                        on_result(results)
                progress.advance(task)
    finally:
        torch.set_num_threads(before)
    machine: dict[str, object] = {
        **kdq_kernels.build_info(),
        "isa": kdq_kernels.cpu_isa(),
        "torch": torch.__version__,
        "peers": peer_versions(),
        "peaks": all_peaks,
    }
    return measurements, machine


def peer_versions() -> dict[str, str]:
    """The optional peers that are installed."""
    versions = {}
    for name in ("onnxruntime", "torchao"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def copy_bytes(case: Case) -> int:
    """A copy that moves as much as a bandwidth-bound case: half its bytes read, half written."""
    return int(case.work / 2) if case.peak == "copy_gbps" else 1 << 24
