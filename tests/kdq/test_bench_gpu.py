"""`kdq bench --device cuda` without a GPU: its cases on CPU tensors, its clocks and limits by stand-ins. No times are
asserted but of clocks that the tests themselves move."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import kdq.cli
from kdq.bench import Case, Contender, distillation, fake_quant, models, peers, plot, run_bench, runner, shapes, table
from kdq.bench.case import check
from kdq.bench.clocks import CallClock, DeviceClock
from kdq.bench.families import FAMILIES
from kdq.bench.int8 import int_mm
from kdq.bench.limits import GPU_BUFFER, LimitMeter, int8_products, reading
from kdq.bench.results import Results
from kdq.bench.runner import Measurement
from kdq.bench.target import CPU, Target
from kdq_kernels import _torch_library

GPU_QUICK = Target(quick=True, gpu=True)
GPU = Target(gpu=True)


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_contender_is_right(family: str) -> None:
    cases = list(FAMILIES[family](GPU_QUICK))
    assert cases
    with torch.inference_mode():
        for case in cases:
            assert any(contender.role == "ours" for contender in case.contenders)
            for contender in case.contenders:
                check(case, contender)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes a minute; what is compiled has to be right without it."""
    for module in (peers, fake_quant, distillation, models):
        monkeypatch.setattr(module, "compiled", lambda function: function)


PRODUCTS = ["int8_matmul", "int8_linear", "int8_weight_only_linear", "codebook_linear", "binary_linear"]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", PRODUCTS)
def test_products_at_awkward_shapes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the contenders that quick runs leave out."""
    monkeypatch.setattr(shapes, "on_gpu", lambda cpu: [(1, 24, 48), (5, 13, 70), (20, 13, 70), (20, 24, 48)])
    with torch.inference_mode():
        for case in FAMILIES[family](GPU):
            for contender in case.contenders:
                check(case, contender)


@pytest.mark.usefixtures("uncompiled")
def test_float_families_with_all_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("MILLION", "SIXTEEN", "SIXTY_FOUR"):
        monkeypatch.setattr(fake_quant, size, (64, 24))
    monkeypatch.setattr(distillation, "GPU_SHAPES", [(distillation.CHUNK + 3, 50)])
    with torch.inference_mode():
        for family in ("fake_quantize", "fake_quantize_out", "distillation_loss"):
            for case in FAMILIES[family](GPU):
                assert {c.name for c in case.contenders} & {"torch.compile", "torch.compile, out"}
                for contender in case.contenders:
                    check(case, contender)


def test_int_mm_is_filled_up_for_a_gpu() -> None:
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in [(5, 70), (13, 70)])
    asked: list[tuple[torch.Size, torch.Size]] = []
    real = torch._int_mm

    def noted(x: Tensor, y: Tensor) -> Tensor:
        asked.append((x.shape, y.shape))
        return real(x, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_int_mm", noted)
        result = int_mm(a, b, GPU)()
    assert asked == [((17, 72), (72, 16))]
    assert torch.equal(result, (a.double() @ b.double().t()).int())


def test_shapes_of_a_gpu() -> None:
    found = shapes.products(GPU, shapes.INT8)
    assert found[: len(shapes.INT8)] == shapes.INT8
    assert len(found) == len(set(found))
    assert {(1, 28672, 4096), (4096, 4096, 14336), (4096, 4096, 4096), (8192, 8192, 8192)} <= set(found)
    assert shapes.products(Target(), shapes.INT8) == shapes.INT8
    assert Target.of(torch.device("cuda:1"), quick=False) == Target(False, torch.device("cuda:1"), True)
    assert Target.of(CPU, quick=True) == Target(quick=True)


# ---- clocks ----------------------------------------------------------------------------------------------------------


class FakeCuda:
    """torch.cuda with a time of its own: events tell it, sleeping moves it, and what happens is written down."""

    def __init__(self) -> None:
        self.now = 0.0
        self.happened: list[str] = []
        self.slept: list[int] = []

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(L2_cache_size=1024)

    def synchronize(self) -> None:
        self.happened.append("synchronize")

    def _sleep(self, cycles: int) -> None:
        self.happened.append("sleep")
        self.slept.append(cycles)
        self.now += 1.0

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at=0.0)

        def record() -> None:
            self.happened.append("record")
            event.at = self.now

        event.record = record
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


def test_the_device_clock_times_the_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, host = FakeCuda(), [0.0]
    monkeypatch.setattr("kdq.bench.clocks.time.perf_counter", lambda: host[0])
    clock = DeviceClock(CPU, cuda)
    assert clock.others.nbytes == 4 * 1024
    monkeypatch.setattr(clock, "others", SimpleNamespace(sum=lambda: cuda.happened.append("read")))
    durations = iter([9.0, 0.25, 0.75])  # the first finds out how long launching takes

    def run() -> None:
        cuda.happened.append("run")
        cuda.now += next(durations)
        host[0] += 0.001

    assert clock.time_round(run, 2) == pytest.approx(0.5)
    assert cuda.slept == [4_000_000, 4_000_000]  # twice a millisecond
    timed = ["read", "sleep", "record", "run", "record"]
    assert cuda.happened == ["synchronize", "run", "synchronize", *timed, *timed, "synchronize"]


def test_the_call_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    host, running = [0.0], [0.0]
    monkeypatch.setattr("kdq.bench.clocks.time.perf_counter", lambda: host[0])

    def run() -> None:
        host[0] += 0.001
        running[0] += 0.01

    def synchronize() -> None:
        host[0] += running[0]
        running[0] = 0.0

    running[0] = 5.0  # of another contender, and not to be counted
    assert CallClock(synchronize).time_round(run, 10) == pytest.approx(0.011)


# ---- limits ----------------------------------------------------------------------------------------------------------


def fake_rates(monkeypatch: pytest.MonkeyPatch, *turns: dict[str, dict[str, float]]) -> list[tuple[str, int]]:
    """The rates of each way by the name of the limit, one turn after the other, the last again and again."""
    asked: list[tuple[str, int]] = []

    def peak_rates(name: str, device: torch.device, *, buffer_bytes: int, seconds: float) -> dict[str, float]:
        turn = sum(name == other for other, _ in asked)
        asked.append((name, buffer_bytes))
        return turns[min(turn, len(turns) - 1)][name]

    monkeypatch.setattr("kdq.bench.limits.peak_rates", peak_rates)
    return asked


def test_the_fastest_way_to_a_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_rates(
        monkeypatch,
        {"int8_gops": {"mma.sync": 500.0, "torch": 800.0}, "read_gbps": {"loads": 4.0}},
        {"int8_gops": {"mma.sync": 900.0, "torch": 700.0}, "read_gbps": {"loads": 3.0}},
        {"int8_gops": {"mma.sync": 500.0, "torch": 600.0}, "read_gbps": {"loads": 2.0}},
    )
    meter = LimitMeter([int8_products(1e6), reading(1e6)], 1, 0.1, torch.device("cuda"))
    for _ in range(3):
        meter.measure()
    assert asked[:2] == [("int8_gops", GPU_BUFFER), ("read_gbps", GPU_BUFFER)]
    described = [(found["rate"], found["way"]) for found in meter.describe()]
    assert described == [(900.0, "mma.sync"), (4.0, "loads")]
    text = table.describe_limits(meter.describe())
    assert text == "int8 products (mma.sync) 900 - 900 Gop/s, reading operands (loads) 4 - 4 GB/s"


# ---- runs ------------------------------------------------------------------------------------------------------------


class HostCuda(FakeCuda):
    """With the host's time."""

    now = property(lambda self: time.perf_counter(), lambda self, value: None)  # type: ignore[assignment]

    def _sleep(self, cycles: int) -> None:
        pass


@pytest.fixture
def gpu_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for a GPU gets CPU tensors, and stand-ins of the clocks."""
    monkeypatch.setattr(_torch_library, "check_gpu", lambda device: None)
    monkeypatch.setattr(runner, "current", lambda target: contextlib.nullcontext())
    monkeypatch.setattr(Target, "of", lambda device, quick: Target(quick, CPU, gpu=device.type == "cuda"))
    monkeypatch.setattr(runner, "clocks_of", lambda device: [CallClock(lambda: None), DeviceClock(CPU, HostCuda())])
    about = {"compute_capability": "9.0", "multiprocessors": 132, "memory_bytes": 141 << 30, "l2_bytes": 50 << 20}
    device = {"device": "a GPU", **about, "cuda": "13.0", "empty_kernel_seconds": 2.5e-6}
    monkeypatch.setattr(runner, "describe_device", lambda _: device)


@pytest.mark.usefixtures("gpu_on_cpu")
def test_results_of_both_clocks(tmp_path: Path) -> None:
    seen: list[list[Measurement]] = []
    names = ["int8_matmul", "fake_quantize"]
    measurements, machine = run_bench(names, quick=True, rounds=1, device="cuda", on_result=seen.append)
    found = list(dict.fromkeys((m.family, m.timing) for m in measurements))
    assert found == [(name, timing) for name in names for timing in ("calls", "device")]
    assert sorted(map(repr, measurements)) == sorted(repr(m) for results in seen for m in results)
    text = table.markdown(measurements, machine)
    for title in ("int8_matmul, calls in a row", "int8_matmul, on the GPU alone", "fake_quantize, on the GPU alone"):
        assert text.count(f"## {title}\n") == 1
    assert "- GPU: a GPU (compute capability 9.0, 132 multiprocessors, 141 GiB, 50 MiB of L2 cache)" in text
    assert "takes 2.5 us on the GPU alone" in text
    assert "| int8_matmul | kdq int8_matmul | on the GPU alone | 2 |" in text
    assert "thread" not in text.split("## int8_matmul")[1]
    assert "Not timed" not in text
    plot.plot(measurements, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000
    results = Results(machine, measurements, [])
    results.save(tmp_path / "results.json")
    again = Results.load(tmp_path / "results.json")
    assert again == results
    assert again.updated(results) == results


def wrong_family(target: Target) -> Iterator[Case]:
    """One right contender, one wrong one, one that does not run; then the family itself breaks."""

    def broken() -> Tensor:
        raise RuntimeError("out of memory")

    right, wrong = (partial(torch.full, (3,), value) for value in (1.0, 2.0))
    contenders = [Contender("right", right, "ours"), Contender("wrong", wrong), Contender("broken", broken)]
    yield Case("wrong_family", "3", [reading(1e6)], torch.ones(3), contenders)
    raise ValueError("shape: too large")


def test_keep_going(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(FAMILIES, "wrong_family", wrong_family)
    with pytest.raises(RuntimeError, match="wrong is wrong"):
        run_bench(["wrong_family"], quick=True)
    names = ("--family", "wrong_family", "--family", "fake_quantize")
    files = ("--json", str(tmp_path / "results.json"), "--markdown", str(tmp_path / "results.md"))
    result = CliRunner().invoke(kdq.cli.app, ["bench", "--quick", "--keep-going", *names, *files])
    assert isinstance(result.exception, RuntimeError)
    assert "3 failures" in str(result.exception)
    results = Results.load(tmp_path / "results.json")
    assert [m.contender for m in results.measurements if m.family == "wrong_family"] == ["right"]
    assert any(m.family == "fake_quantize" for m in results.measurements)
    text = (tmp_path / "results.md").read_text()
    for row in (
        "| wrong_family | 3 | wrong | wrong_family 3: wrong is wrong: relative error 1, ",
        "| wrong_family | 3 | broken | out of memory |",
        "| wrong_family |  |  | shape: too large |",
    ):
        assert row in text
        assert row.split("|")[-2].strip() in result.output.replace("\n", " ")


def test_a_gpu_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Nothing is run first; what is asked for wrongly is said as well."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")

    def bench(*arguments: str) -> str:
        command = [sys.executable, "-c", "from kdq.cli import main; main()", "bench", *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
        assert result.returncode == 1
        return " ".join(result.stderr.split())

    why = "torch finds 0 CUDA GPUs" if _torch_library.has_cuda_operators() else "no operators for CUDA tensors"
    assert why in bench("--device", "cuda", "--quick")
    assert "error: device: expected cuda or cuda:N, got meta" in bench("--device", "meta")
    assert "error: scaling: expected device cpu, got cuda" in bench("--device", "cuda", "--scaling", "scaling.png")


@pytest.mark.usefixtures("gpu_on_cpu")
def test_threads_are_of_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"threads: expected none with device cuda, got \[2\]"):
        run_bench(["int8_matmul"], quick=True, device="cuda", threads=[2])
