"""What a GPU can do at most: the reckoning and the refusals without one, and the rates with one (`make test-cuda`)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

import kdq_kernels
from kdq_kernels import _torch_library, gpu_peaks
from kdq_kernels.cpu import PeakName

with_gpu = pytest.mark.skipif(
    not (_torch_library.has_cuda_operators() and torch.cuda.is_available()), reason="no GPU, or no operators for it"
)
CUDA = torch.device("cuda")


class FakeEvent:
    """Of a GPU whose time `now` is."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


def test_the_best_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    host = iter(range(100))
    monkeypatch.setattr("kdq_kernels.gpu_peaks.time.perf_counter", lambda: next(host))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    seconds = iter([100.0, 4.0, 2.0, 8.0])  # the first is not timed

    def work() -> float:
        FakeEvent.now += next(seconds)
        return 6e9

    assert gpu_peaks.best_rate(work, seconds=2.5) == pytest.approx(3e9)
    assert list(seconds) == []


def test_every_limit_has_its_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors, with products small enough for it."""
    found = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(gpu_peaks, "SIDE", 32)
    asked: list[tuple[torch.Size, int, int]] = []
    ops: Any = SimpleNamespace(
        arithmetic=lambda out, loop, steps: asked.append((out.shape, loop, steps)) or 7,
        read=lambda source, blocks: asked.append((source.shape, blocks, 0)),
    )
    monkeypatch.setattr(torch.ops, "kdq_peaks", ops, raising=False)
    units = {
        name: [work() for work in gpu_peaks.ways_of(name, torch.device("cpu"), 1000).values()]
        for name in get_args(PeakName)
    }
    assert units == {
        "int8_gops": [7, 2 * 32**3],
        "binary_gops": [7],
        "bfloat16_gflops": [7, 2 * 32**3],
        "float32_gflops": [7],
        "copy_gbps": [2 * 992],
        "read_gbps": [992],
    }
    assert asked[:2] == [((12, 256), 0, 4096), ((12, 256), 1, 4096)]
    assert asked[-1] == ((248,), 24, 0)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="threads: expected 1 for device cuda, got 2"):
        kdq_kernels.machine_peak("int8_gops", 2, device="cuda")
    with pytest.raises(ValueError, match="device: expected cuda or cuda:N, got meta"):
        kdq_kernels.machine_peak("int8_gops", device="meta")
    monkeypatch.setattr(_torch_library, "has_cuda_operators", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="device: torch finds 1 CUDA GPUs, so there is no cuda:1"):
        kdq_kernels.machine_peak("int8_gops", device="cuda:1")
    with pytest.raises(ValueError, match="seconds: expected more than 0 and at most 60, got 0"):
        kdq_kernels.machine_peak("int8_gops", device="cuda", seconds=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=3))
    with pytest.raises(ValueError, match="name: expected one of int8_gops, .*, read_gbps, got 'int4_gops'"):
        gpu_peaks.ways_of("int4_gops", CUDA, 1000)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name: expected one of int8_gops"):
        kdq_kernels.machine_peak("int4_gops")  # type: ignore[arg-type]


@with_gpu
@pytest.mark.parametrize("name", get_args(PeakName))
def test_every_peak_is_measured(name: PeakName) -> None:
    rates = gpu_peaks.peak_rates(name, CUDA, buffer_bytes=1 << 28, seconds=0.02)
    assert min(rates.values()) > 0
    assert kdq_kernels.machine_peak(name, buffer_bytes=1 << 28, seconds=0.02, device="cuda") > 0


@with_gpu
def test_what_is_read_is_read_once() -> None:
    words = gpu_peaks.random_words(CUDA, 1 << 20)
    read = torch.ops.kdq_peaks.read(words, 7)
    assert read.shape == (7, gpu_peaks.THREADS)

    def xor(values: torch.Tensor) -> int:
        bits = values.flatten().cpu()[:, None] >> torch.arange(32) & 1
        return int((bits.sum(0) % 2 << torch.arange(32)).sum())

    assert xor(read) == xor(words)
