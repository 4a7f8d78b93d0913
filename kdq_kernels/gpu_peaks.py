"""What a GPU can do at most, measured now: `machine_peak` of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kdq_kernels import _torch_library
from kdq_kernels.cpu import PeakName

Work = Callable[[], float]  # puts work on the current stream; returns its operations or bytes

# By the name of the limit: kdq::cuda::PeakLoop, its instruction, and steps that take about a millisecond.
LOOPS: dict[PeakName, tuple[int, str, int]] = {
    "int8_gops": (0, "mma.sync m16n8k32", 4096),
    "binary_gops": (1, "mma.sync m16n8k256", 4096),
    "bfloat16_gflops": (2, "mma.sync m16n8k16", 4096),
    "float32_gflops": (3, "fused multiply-add", 16384),
}
LOOP_BLOCKS = 4  # of a multiprocessor, all at once
READ_BLOCKS = 8
THREADS = 256  # of a block: kdq::cuda::kPeakThreads
SIDE = 8192  # of the products of torch that compete
SLEEP_CYCLES = 200_000  # a tenth of a millisecond, in which the host launches what is timed


def peak_rates(name: PeakName, device: torch.device, *, buffer_bytes: int, seconds: float) -> dict[str, float]:
    """The rate of each way to reach a limit, in units of 1e9 a second. See `machine_peak`.

    Arithmetic: a loop of one instruction on registers, and for int8 and bfloat16 the largest product that torch gets
    from cuBLAS, which has instructions (wgmma on Hopper) that the loops have not. Bandwidth: torch's copy, and a kernel
    that reads 16 bytes at once.

    Raises:
        ValueError: the name is unknown, or seconds is out of range.
        RuntimeError: there is no such GPU, or this build has no operators for it.
    """
    _torch_library.check_gpu(device)
    if not 0 < seconds <= 60:
        raise ValueError(f"seconds: expected more than 0 and at most 60, got {seconds}")
    with torch.cuda.device(device), torch.inference_mode():
        ways = ways_of(name, device, buffer_bytes)
        return {way: best_rate(work, seconds / len(ways)) / 1e9 for way, work in ways.items()}


def ways_of(name: PeakName, device: torch.device, buffer_bytes: int) -> dict[str, Work]:
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    if name == "copy_gbps":
        return {"copy_": copying(device, buffer_bytes)}
    if name == "read_gbps":
        return {"16 bytes at once": reading(device, buffer_bytes, READ_BLOCKS * multiprocessors)}
    if name not in LOOPS:
        raise ValueError(f"name: expected one of {', '.join([*LOOPS, 'copy_gbps', 'read_gbps'])}, got {name!r}")
    loop, instruction, steps = LOOPS[name]
    out = torch.empty(LOOP_BLOCKS * multiprocessors, THREADS, device=device)
    ways: dict[str, Work] = {instruction: lambda: torch.ops.kdq_peaks.arithmetic(out, loop, steps)}
    if name == "int8_gops":
        a, b = (torch.randint(-127, 128, (SIDE, SIDE), dtype=torch.int8, device=device) for _ in range(2))
        ways[f"torch._int_mm of {SIDE}"] = product(lambda: torch._int_mm(a, b.t()))
    elif name == "bfloat16_gflops":
        x, w = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=device) for _ in range(2))
        ways[f"torch.mm of {SIDE}"] = product(lambda: torch.mm(x, w.t()))
    return ways


def product(multiply: Callable[[], torch.Tensor]) -> Work:
    def work() -> float:
        multiply()
        return 2.0 * SIDE**3

    return work


def random_words(device: torch.device, n_bytes: int) -> torch.Tensor:
    return torch.empty(n_bytes // 16 * 4, dtype=torch.int32, device=device).random_()


def copying(device: torch.device, n_bytes: int) -> Work:
    source = random_words(device, n_bytes)
    target = torch.empty_like(source)

    def work() -> float:
        target.copy_(source)
        return 2.0 * source.nbytes

    return work


def reading(device: torch.device, n_bytes: int, blocks: int) -> Work:
    source = random_words(device, n_bytes)

    def work() -> float:
        torch.ops.kdq_peaks.read(source, blocks)
        return float(source.nbytes)

    return work


def best_rate(work: Work, seconds: float) -> float:
    """Units a second in the best of the rounds that fit in the time."""
    work()  # loads the kernel, chooses an algorithm
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    until = time.perf_counter() + seconds
    best = 0.0
    while best == 0 or time.perf_counter() < until:
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        units = work()
        end.record()
        end.synchronize()
        best = max(best, 1e3 * units / start.elapsed_time(end))
    return best
