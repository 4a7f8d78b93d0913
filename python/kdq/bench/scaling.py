"""How the time of a product grows along each of M, N and K, and what more threads bring.

Work that is in proportion to the operations doubles its time with each doubling of a side: a line of slope 1 on
logarithmic axes, and a growth of 2. Efficiency is the time on one thread over n times the time on n threads; a cube of
256 is the smallest for which threads should be worth their start.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

import kdq_kernels as kk
from kdq.bench.clocks import HostClock
from kdq.bench.runner import check_threads, plan, torch_threads
from kdq.bench.shapes import Shape
from kdq.bench.table import format_time, markdown_table

SIZES = [64, 128, 256, 512, 1024, 2048, 4096]
OTHER = 1024  # the sides that stay
CUBES = [256, 512, 1024, 2048]
LARGE = 512  # growth is taken from here on: below, the call and the cache count
SIDES = ("M", "N", "K")
CUBE = "cube"
ROUNDS = 5


@dataclass(frozen=True)
class Point:
    """Seconds a call of a kernel at one size of the side that varies: "M", "N", "K" or "cube"."""

    kernel: str
    along: str
    size: int
    threads: int
    median: float

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def int8_linear(m: int, n: int, k: int) -> Callable[[], Tensor]:
    x, scale, bias = torch.randn(m, k), torch.rand(n) + 0.5, torch.randn(n)
    packed = kk.pack_int8_weight(torch.randint(-127, 128, (n, k), dtype=torch.int8))
    return lambda: kk.int8_linear(x, packed, scale, bias)


def int8_matmul(m: int, n: int, k: int) -> Callable[[], Tensor]:
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    packed = kk.pack_int8_weight(torch.randint(-127, 128, (n, k), dtype=torch.int8))
    return lambda: kk.int8_matmul(a, packed)


def binary_matmul(m: int, n: int, k: int) -> Callable[[], Tensor]:
    a, b = kk.pack_signs(torch.randn(m, k)), kk.pack_signs(torch.randn(n, k))
    return lambda: kk.binary_matmul(a, b, k)


KERNELS = {"int8_linear": int8_linear, "int8_matmul": int8_matmul, "binary_matmul": binary_matmul}


def shape_of(along: str, size: int) -> Shape:
    if along == CUBE:
        return size, size, size
    m, n, k = (size if along == side else OTHER for side in SIDES)
    return m, n, k


def run_scaling(threads: Sequence[int], quick: bool = False) -> list[Point]:
    """Times every kernel along every side, on one number of threads after the other: a pool whose size changes between
    calls is slower to start."""
    check_threads(threads)
    sizes, cubes = (SIZES[:2], CUBES[:1]) if quick else (SIZES, CUBES)
    wanted = [
        (count, kernel, along, size)
        for count, kernel, along in itertools.product(threads, KERNELS, (*SIDES, CUBE))
        for size in (cubes if along == CUBE else sizes)
    ]
    points: list[Point] = []
    with torch_threads(), torch.inference_mode(), Progress(transient=True) as progress:
        for count, kernel, along, size in progress.track(wanted, description="scaling"):
            torch.set_num_threads(count)
            seconds = median_time(KERNELS[kernel](*shape_of(along, size)), 1 if quick else ROUNDS)
            points.append(Point(kernel, along, size, count, seconds))
    return points


def median_time(run: Callable[[], Tensor], rounds: int) -> float:
    clock = HostClock()
    calls, _ = plan(clock, run, rounds)
    samples = []
    for _ in range(rounds):
        clock.time_round(run, 1)
        samples.append(clock.time_round(run, calls))
    return statistics.median(samples)


def line(points: Sequence[Point], kernel: str, along: str, threads: int) -> dict[int, float]:
    """Times by size."""
    return {p.size: p.median for p in points if (p.kernel, p.along, p.threads) == (kernel, along, threads)}


def growth(times: dict[int, float]) -> str:
    """The factor a doubling, over the large sizes; empty where fewer than two were timed."""
    large = [size for size in times if size >= LARGE]
    if len(large) < 2:
        return ""
    doublings = math.log2(large[-1] / large[0])
    return f"{(times[large[-1]] / times[large[0]]) ** (1 / doublings):.2f}x"


def efficiency(points: Sequence[Point], kernel: str, threads: int) -> dict[int, float]:
    """The share of `threads` times one thread's speed, by size of the cube; empty where one thread was not timed."""
    one, many = line(points, kernel, CUBE, 1), line(points, kernel, CUBE, threads)
    return {size: one[size] / (threads * many[size]) for size in one if size in many}


def thread_counts(points: Sequence[Point]) -> list[int]:
    return sorted({p.threads for p in points})


def markdown(points: Sequence[Point]) -> str:
    """A section for RESULTS.md: times along each side, then the efficiency of threads."""
    sizes = sorted({p.size for p in points if p.along != CUBE})
    rows = []
    for kernel, along, threads in itertools.product(KERNELS, SIDES, thread_counts(points)):
        times = line(points, kernel, along, threads)
        cells = [format_time(times[size]) for size in sizes]
        rows.append([f"{kernel}, along {along}", str(threads), *cells, growth(times)])
    columns = ["kernel", "threads", *map(str, sizes), f"a doubling from {LARGE} on"]
    lines = ["", "## Scaling", "", f"The other sides are {OTHER}. Twice the work should take 2.00x the time.", ""]
    lines += markdown_table(columns, rows, text_columns=1)
    rows = [
        [kernel, str(threads), *(f"{100 * share:.0f}%" for share in efficiency(points, kernel, threads).values())]
        for kernel, threads in itertools.product(KERNELS, thread_counts(points))
        if threads > 1 and efficiency(points, kernel, threads)
    ]
    if rows:
        cubes = [f"{size}x{size}x{size}" for size in sorted({p.size for p in points if p.along == CUBE})]
        lines += ["", "Efficiency: the time on one thread over the number of threads times the time on them.", ""]
        lines += markdown_table(["kernel", "threads", *cubes], rows, text_columns=1)
    return "\n".join(lines) + "\n"


def plot(points: Sequence[Point], path: Path) -> None:
    """A row a kernel: time along M, N and K with a line of slope 1, then the efficiency of threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(KERNELS), 4, figsize=(15, 3.4 * len(KERNELS)), layout="constrained")
    for kernel, panels in zip(KERNELS, axes, strict=True):
        for along, panel in zip(SIDES, panels, strict=False):
            draw_times(panel, points, kernel, along)
        draw_efficiency(panels[-1], points, kernel)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_times(panel: Any, points: Sequence[Point], kernel: str, along: str) -> None:
    for threads in thread_counts(points):
        times = line(points, kernel, along, threads)
        label = f"{threads} {'thread' if threads == 1 else 'threads'}"
        panel.plot(list(times), [1e6 * t for t in times.values()], marker="o", label=label)
        last = max(times)  # slope 1 through the largest, where the call counts least
        panel.plot(list(times), [1e6 * times[last] * size / last for size in times], "k--", linewidth=0.8)
    others = " = ".join(side for side in SIDES if side != along)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_title(f"{kernel}, {others} = {OTHER}", loc="left", fontsize=10)
    panel.set_xlabel(along)
    panel.set_ylabel("us (dashed: slope 1)")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)


def draw_efficiency(panel: Any, points: Sequence[Point], kernel: str) -> None:
    for threads in thread_counts(points):
        shares = efficiency(points, kernel, threads)
        if threads > 1 and shares:
            panel.plot(list(shares), [100 * s for s in shares.values()], marker="o", label=f"1 to {threads} threads")
            panel.legend(fontsize=8, loc="lower right")
    panel.axhline(100, color="black", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_ylim(0, 125)
    panel.set_title(f"{kernel}, cubes: efficiency of threads", loc="left", fontsize=10)
    panel.set_xlabel("M = N = K")
    panel.set_ylabel("%")
    panel.grid(alpha=0.3)
