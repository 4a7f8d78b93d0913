"""Which instruction set the kernels run on, and what this machine can do at most."""

from __future__ import annotations

from typing import Literal, TypedDict

from kdq_kernels import _C

PeakName = Literal["int8_gops", "binary_gops", "bfloat16_gflops", "float32_gflops", "copy_gbps", "read_gbps"]


class BuildInfo(TypedDict):
    """What `build_info()` returns."""

    version: str
    compiler: str
    torch_calls: str | None
    cpu: str
    cpu_features: str
    isas: list[str]


class MachinePeaks(TypedDict):
    """What `machine_peaks()` returns. A multiply-accumulate, and one bit of xor + popcount, count as two operations."""

    threads: int
    int8_gops: float
    binary_gops: float
    float32_gflops: float
    bfloat16_gflops: float
    copy_gbps: float
    copy_bytes: int
    read_gbps: float
    read_bytes: int


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


def bitplane_pairs() -> int:
    """The most pairs of bit planes, of activations times of weights, with which `bitplane_linear` of many rows takes
    less time than `int8_linear`, on the instruction set in force; 0: none."""
    return _C.bitplane_pairs()


def build_info() -> BuildInfo:
    """Version, compiler, CPU and its relevant features; and `torch_calls`, the version of torch in which operators are
    called directly, which saves 0.7 us a call (None: not built). In another version they are called by `torch.ops`."""
    return _C.build_info()


def machine_peak(
    name: PeakName, threads: int = 1, *, buffer_bytes: int = 64 << 20, seconds: float = 0.2, device: str = "cpu"
) -> float:
    """Measures, now, one limit that kernels on this machine run against, in units of 1e9 a second.

    The arithmetic peaks come from loops that keep their operands in registers, on the instruction set in force or one
    below it; the copy bandwidth counts bytes read plus bytes written; the read bandwidth is that of one buffer read
    again and again. For each, several instruction sequences compete, and the best round of the best counts.

    Args:
        name: one of the names in `MachinePeaks`.
        threads: how many threads run at once.
        buffer_bytes: size of the buffer that is read, or of each of the two of the copy, for all threads together;
            below the cache size it measures the cache.
        seconds: how long it takes, about.
        device: "cpu", or a GPU as torch names it, "cuda" or "cuda:1".

    Raises:
        ValueError: an unknown name, or a number out of range.
        RuntimeError: there is no such GPU, or this build has no operators for it.
    """
    if device == "cpu":
        return _C.machine_peak(name, threads, buffer_bytes, seconds)
    if threads != 1:
        raise ValueError(f"threads: expected 1 for device {device}, got {threads}")
    import torch

    from kdq_kernels.gpu_peaks import peak_rates

    rates = peak_rates(name, torch.device(device), buffer_bytes=buffer_bytes, seconds=seconds)
    return max(rates.values())


def machine_peaks(
    threads: int = 1, *, copy_bytes: int = 64 << 20, read_bytes: int = 64 << 20, seconds: float = 0.2
) -> MachinePeaks:
    """Measures all the limits, each for `seconds`; see `machine_peak`."""
    return {
        "threads": threads,
        "int8_gops": machine_peak("int8_gops", threads, seconds=seconds),
        "binary_gops": machine_peak("binary_gops", threads, seconds=seconds),
        "float32_gflops": machine_peak("float32_gflops", threads, seconds=seconds),
        "bfloat16_gflops": machine_peak("bfloat16_gflops", threads, seconds=seconds),
        "copy_gbps": machine_peak("copy_gbps", threads, buffer_bytes=copy_bytes, seconds=seconds),
        "copy_bytes": copy_bytes,
        "read_gbps": machine_peak("read_gbps", threads, buffer_bytes=read_bytes, seconds=seconds),
        "read_bytes": read_bytes,
    }
