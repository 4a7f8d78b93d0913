"""What bounds a case from below: each limit of the machine that it meets, and how much of it the case needs.

The machine's rates are measured beside the case, in the same process: before, between and after the rounds, and the
largest counts, so that a moment in which something else ran does not make a kernel look better than it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import kdq_kernels
from kdq.bench.target import CPU
from kdq_kernels.cpu import PeakName
from kdq_kernels.gpu_peaks import peak_rates

SMALLEST_BUFFER = 4096  # bytes a thread; smaller ones measure the call
GPU_BUFFER = 1 << 30  # bytes: far beyond any cache, as a GPU's bandwidth is that of its memory


@dataclass(frozen=True)
class Limit:
    """One bound: `amount` operations or bytes at the rate of `peak`.

    Attributes:
        name: as shown in the table.
        amount: the least that the job takes, whoever does it.
    """

    name: str
    peak: PeakName
    amount: float

    @property
    def unit(self) -> str:
        """Of the rate: 1e9 of it a second."""
        return "GB/s" if self.peak in ("copy_gbps", "read_gbps") else "Gop/s"

    def buffer_bytes(self, threads: int) -> int:
        """The buffer that a bandwidth is measured with: it moves as much as the case, so it lies where that lies."""
        moved = self.amount / 2 if self.peak == "copy_gbps" else self.amount
        return max(int(moved), threads * SMALLEST_BUFFER)


def int8_products(operations: float) -> Limit:
    return Limit("int8 products", "int8_gops", operations)


def binary_products(operations: float) -> Limit:
    return Limit("binary products", "binary_gops", operations)


def float_products(operations: float, dtype: torch.dtype) -> Limit:
    """Of activations in that dtype, added up in float32."""
    if dtype == torch.bfloat16:
        return Limit("bfloat16 products", "bfloat16_gflops", operations)
    return Limit("float32 products", "float32_gflops", operations)


def reading(n_bytes: float) -> Limit:
    """Weights and activations must be read once; with few rows that takes longer than the arithmetic."""
    return Limit("reading operands", "read_gbps", n_bytes)


def copying(n_bytes: float) -> Limit:
    """For element-wise work: bytes read plus bytes written."""
    return Limit("copying memory", "copy_gbps", n_bytes)


class LimitMeter:
    """Measures the rates of some limits, as often as it is asked to, and keeps the largest of each.

    Attributes:
        ways: how a GPU reached that rate.
    """

    def __init__(self, limits: Sequence[Limit], threads: int, seconds: float, device: torch.device = CPU) -> None:
        self.threads = threads
        self.seconds = seconds
        self.device = device
        self.rates: dict[Limit, float] = dict.fromkeys(limits, 0.0)
        self.ways: dict[Limit, str] = {}

    def measure(self) -> None:
        for limit, best in self.rates.items():
            if self.device.type != "cpu":
                rates = peak_rates(limit.peak, self.device, buffer_bytes=GPU_BUFFER, seconds=self.seconds)
                way, rate = max(rates.items(), key=lambda item: item[1])
                if rate > best:
                    self.ways[limit] = way
            else:
                rate = kdq_kernels.machine_peak(
                    limit.peak, self.threads, buffer_bytes=limit.buffer_bytes(self.threads), seconds=self.seconds
                )
            self.rates[limit] = max(best, rate)

    def binding(self) -> tuple[Limit, float]:
        """The limit that takes the longest, and its rate."""
        return max(self.rates.items(), key=lambda item: item[0].amount / item[1])

    def describe(self) -> list[dict[str, object]]:
        """For JSON."""
        found: list[dict[str, object]] = []
        for limit, rate in self.rates.items():
            way = {"way": self.ways[limit]} if limit in self.ways else {}
            found.append({"limit": limit.name, "peak": limit.peak, "rate": rate, "unit": limit.unit, **way})
        return found
