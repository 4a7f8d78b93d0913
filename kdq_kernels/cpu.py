"""Which instruction set the kernels run on, and what this machine can do at most."""

from __future__ import annotations

from typing import TypedDict

from kdq_kernels import _C


class BuildInfo(TypedDict):
    """What `build_info()` returns."""

    version: str
    compiler: str
    cpu: str
    cpu_features: str
    isas: list[str]


class MachinePeaks(TypedDict):
    """What `machine_peaks()` returns. A multiply-accumulate, and one bit of xor + popcount, count as two operations."""

    threads: int
    int8_gops: float
    binary_gops: float
    float32_gflops: float
    copy_gbps: float
    copy_bytes: int


def cpu_isa() -> str:
    """The instruction set in force: "reference", "avx2", "avx512" or "avx512vnni".

    Raises:
        ValueError, RuntimeError: `KDQ_ISA` names one that is unknown or cannot run here.
    """
    return _C.cpu_isa()


def available_isas() -> list[str]:
    """Every instruction set that is built in and that CPU and operating system can run, lowest first."""
    return _C.available_isas()


def set_isa(name: str) -> None:
    """Forces an instruction set for the whole process; "auto" returns to the best one.

    Weights packed before the change are refused afterwards, with an error that says so: pack them again. Integer
    results are the same on every instruction set, bit for bit.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: it is known but cannot run here.
    """
    _C.set_isa(name)


def build_info() -> BuildInfo:
    """Version, compiler, CPU and its relevant features."""
    return _C.build_info()


def machine_peaks(threads: int = 1, *, copy_bytes: int = 64 << 20, seconds: float = 0.2) -> MachinePeaks:
    """Measures, now, the limits that kernels on this machine run against.

    The arithmetic peaks come from loops that keep their operands in registers, on the instruction set in force; the
    copy bandwidth counts bytes read plus bytes written.

    Args:
        threads: how many threads run at once.
        copy_bytes: size of each of the two buffers of the copy; below the cache size it measures the cache.
        seconds: how long each of the four loops runs.
    """
    return _C.machine_peaks(threads, copy_bytes, seconds)
