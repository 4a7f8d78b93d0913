"""How calls are timed: by the host's clock, on a CPU and on a GPU, and by a GPU's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

Timing = Literal["cpu", "calls", "device"]
Run = Callable[[], object]

GPU_ROUND_SECONDS = 0.005  # less disturbs it
GPU_HERTZ = 2e9  # no less than its clock, so that it sleeps long enough


class Clock(Protocol):
    """What times.

    Attributes:
        timing: what its times are, for the results.
        pause: seconds to wait before a round of several threads.
        round_seconds: how long a round is, about.
        most_calls: of a round.
    """

    timing: Timing
    pause: float
    round_seconds: float
    most_calls: int

    def time_round(self, run: Run, calls: int) -> float:
        """Seconds a call, averaged over `calls` calls."""
        ...


class HostClock:
    """From before the first call of a round until the last is done."""

    timing: Timing = "cpu"
    # The threads of the contender before go to sleep: ONNX Runtime's look for work for 33 ms after a call.
    pause = 0.04
    round_seconds = 0.02
    most_calls = 1_000_000

    def time_round(self, run: Run, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls


class CallClock(HostClock):
    """The same on a GPU: calls in a row, as in a user's loop, and then a wait for the GPU. Launching them counts, what
    is still in the GPU's cache from the call before is found there."""

    timing: Timing = "calls"
    pause = 0.0
    round_seconds = GPU_ROUND_SECONDS

    def __init__(self, synchronize: Callable[[], object] = torch.cuda.synchronize) -> None:
        self.synchronize = synchronize

    def time_round(self, run: Run, calls: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        self.synchronize()
        return (time.perf_counter() - start) / calls


class DeviceClock:
    """What a call takes the GPU alone: events around each call.

    Before each, the GPU reads four times what its L2 cache holds, so that operands come from memory as weights do in
    a model of many layers, and then sleeps for twice the time in which the host launches the call, so that its kernels
    follow each other without a gap. A time contains that of the events, which `empty()` shows.

    Args:
        cuda: `torch.cuda`, or what stands in for it in tests.
    """

    timing: Timing = "device"
    pause = 0.0
    round_seconds = GPU_ROUND_SECONDS
    most_calls = 20

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.cuda = cuda
        l2 = cuda.get_device_properties(device).L2_cache_size
        self.others = torch.ones(l2, dtype=torch.float32, device=device)  # four bytes each

    def time_round(self, run: Run, calls: int) -> float:
        cycles = int(2 * GPU_HERTZ * self.launching(run))
        events = []
        for _ in range(calls):
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            self.others.sum()
            self.cuda._sleep(cycles)
            start.record()
            run()
            end.record()
            events.append((start, end))
        self.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3 / calls

    def launching(self, run: Run) -> float:
        """Seconds until the host has launched a call."""
        self.cuda.synchronize()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        self.cuda.synchronize()
        return seconds

    def empty(self) -> float:
        """Seconds of a kernel that does nothing."""
        return self.time_round(lambda: self.cuda._sleep(0), self.most_calls)


def clocks_of(device: torch.device) -> list[Clock]:
    return [HostClock()] if device.type == "cpu" else [CallClock(), DeviceClock(device)]
