"""The benchmarks on small shapes: that they run, refuse wrong results, and reckon rightly. No times are asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kdq_kernels
from kdq.bench import Case, Contender, plot, run_bench, scaling, table
from kdq.bench.case import check
from kdq.bench.clocks import HostClock
from kdq.bench.families import FAMILIES
from kdq.bench.limits import LimitMeter, copying, int8_products, reading
from kdq.bench.results import SAME, Results
from kdq.bench.runner import Measurement, plan
from kdq.bench.scaling import Point
from kdq_kernels.cpu import PeakName


def test_bench_measures_every_family(tmp_path: Path) -> None:
    measurements, machine = run_bench(quick=True, rounds=1)
    families = set(FAMILIES)
    assert {m.family for m in measurements} == families
    for m in measurements:
        assert 0 < m.fastest <= m.median <= m.slowest
        assert (m.ratio_to_best_peer is not None) <= (m.role == "ours")
        assert m.percent_of_limit > 0
        assert m.limited_by in {found["limit"] for found in machine["limits"] if found["shape"] == m.shape}
    text = table.markdown(measurements, machine)
    assert all(f"## {family}" in text for family in families)
    assert "limited by" in text
    plot.plot(measurements, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_bench_refuses_to_time_a_wrong_result() -> None:
    reference = torch.ones(3)
    wrong = Contender("wrong", lambda: torch.tensor([1.0, 1.0, 1.1]), tolerance=0.01)
    case = Case("family", "3", [int8_products(1.0)], reference, [wrong])
    with pytest.raises(RuntimeError, match="wrong is wrong.*not timed"):
        check(case, wrong)
    with pytest.raises(RuntimeError, match="not timed"):
        check(case, Contender("nan", lambda: reference * torch.nan, tolerance=1.0))
    with pytest.raises(ValueError, match="family"):
        run_bench(["int3"])


def fake_peaks(monkeypatch: pytest.MonkeyPatch, *rates: dict[str, float]) -> list[tuple[str, int]]:
    """Each measurement of a peak answers from the next dictionary, the last again and again; returns what was asked."""
    asked: list[tuple[str, int]] = []

    def machine_peak(name: PeakName, threads: int, *, buffer_bytes: int, seconds: float) -> float:
        asked.append((name, buffer_bytes))
        turn = sum(name == other for other, _ in asked) - 1
        return rates[min(turn, len(rates) - 1)][name]

    monkeypatch.setattr(kdq_kernels, "machine_peak", machine_peak)
    return asked


def test_the_binding_limit_is_the_one_that_takes_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"int8_gops": 400.0, "read_gbps": 50.0}
    asked = fake_peaks(monkeypatch, peaks)
    one_row = LimitMeter([int8_products(2e6), reading(1e6)], threads=1, seconds=0.1)
    one_row.measure()
    assert one_row.binding()[0].name == "reading operands"
    assert asked == [("int8_gops", 2_000_000), ("read_gbps", 1_000_000)]
    many_rows = LimitMeter([int8_products(2e8), reading(1e6)], threads=1, seconds=0.1)
    many_rows.measure()
    assert many_rows.binding()[0].name == "int8 products"


def test_the_largest_measured_rate_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_peaks(monkeypatch, {"copy_gbps": 10.0}, {"copy_gbps": 30.0}, {"copy_gbps": 20.0})
    meter = LimitMeter([copying(1e6)], threads=1, seconds=0.1)
    for _ in range(3):
        meter.measure()
    assert list(meter.rates.values()) == [30.0]


def test_bandwidth_is_measured_with_as_many_bytes_as_the_case_moves() -> None:
    assert reading(1e6).buffer_bytes(threads=2) == 1_000_000
    assert copying(1e6).buffer_bytes(threads=2) == 500_000
    assert reading(10).buffer_bytes(threads=2) == 8192


def test_slow_contenders_run_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("kdq.bench.clocks.time.perf_counter", lambda: now[0])

    def taking(seconds: float) -> None:
        now[0] += seconds

    clock = HostClock()
    assert plan(clock, lambda: taking(0.001), 9) == (20, 9)
    assert plan(clock, lambda: taking(0.25), 9) == (1, 4)
    assert plan(clock, lambda: taking(7.0), 9) == (1, 2)


def measurement(contender: str, role: str, ratio: float | None, share: float) -> Measurement:
    times = {"median": 1.0, "fastest": 1.0, "slowest": 1.0, "rate": 1.0, "unit": "Gop/s", "error": 0.0}
    about = {"family": "int8_linear", "shape": f"{share}", "threads": 1, "limited_by": "int8 products"}
    return Measurement(
        contender=contender, role=role, ratio_to_best_peer=ratio, percent_of_limit=share, **times, **about
    )  # type: ignore[arg-type]


def test_overview_and_bars() -> None:
    rows = [
        measurement("ours", "ours", 2.0, 80.0),
        measurement("ours", "ours", 0.5, 40.0),
        measurement("slow", "peer", None, 40.0),
        measurement("fast", "peer", None, 80.0),
        measurement("other job", "context", None, 80.0),
    ]
    assert table.geometric_means(rows) == ["Geometric mean of the ratios to the best peer: ours 1.00x."]
    assert table.overview(rows)[-1] == "| int8_linear | ours | 1 | 2 | 1.00x | 0.50x - 2.00x | 60% | 80% |"
    assert plot.bars(rows) == {"ours": {"80.0": 80.0, "40.0": 40.0}, "best peer": {"40.0": 40.0, "80.0": 80.0}}


def test_scaling_reckons_growth_and_efficiency() -> None:
    sizes = scaling.SIZES
    points = [Point("int8_matmul", "M", size, 1, size**1.5) for size in sizes]
    points += [Point("int8_matmul", "cube", 256, threads, 1.0 / threads**0.5) for threads in (1, 4)]
    assert scaling.growth(scaling.line(points, "int8_matmul", "M", 1)) == f"{2**1.5:.2f}x"
    assert scaling.growth({64: 1.0, 512: 2.0}) == ""
    assert scaling.efficiency(points, "int8_matmul", 4) == {256: 0.5}
    assert scaling.shape_of("N", 64) == (1024, 64, 1024)
    assert scaling.shape_of("cube", 64) == (64, 64, 64)


def test_cli_scaling_alone(tmp_path: Path) -> None:
    def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from kdq.cli import main; main()", "bench", "--no-families", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)

    files = ("--scaling", "scaling.png", "--markdown", "results.md", "--json", "results.json")
    result = bench("--quick", "--threads", "1", "--threads", "2", *files)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "## Scaling" in (tmp_path / "results.md").read_text()
    assert len(json.loads((tmp_path / "results.json").read_text())["scaling"]) == 3 * 7 * 2
    wrong = bench("--plot", "results.png")
    assert wrong.returncode == 1
    assert "error: families" in wrong.stderr


def measured(family: str, threads: int, median: float) -> Measurement:
    rates = {"rate": 1.0, "unit": "Gop/s", "limited_by": "int8 products", "percent_of_limit": 50.0, "error": 0.0}
    times = {"median": median, "fastest": median, "slowest": median}
    return Measurement(family, "1x1x1", "kdq", "ours", threads, **times, **rates, ratio_to_best_peer=None)


def found(measurements: list[Measurement], cpu: str = "some") -> Results:
    machine = dict.fromkeys(SAME, "same") | {"cpu": cpu}
    limits = [{"family": m.family, "threads": m.threads, "rate": m.median} for m in measurements]
    return Results({**machine, "limits": limits, "failures": []}, measurements, [Point("int8_linear", "M", 64, 1, 1.0)])


def test_update_replaces_what_was_measured_anew(tmp_path: Path) -> None:
    before = found([measured("a", 1, 1.0), measured("b", 1, 1.0), measured("b", 2, 1.0), measured("c", 1, 1.0)])
    before.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == before
    after = before.updated(found([measured("b", 2, 7.0), measured("b", 1, 9.0)]))
    assert [(m.family, m.threads, m.median) for m in after.measurements] == [
        ("a", 1, 1.0), ("b", 1, 9.0), ("b", 2, 7.0), ("c", 1, 1.0)
    ]  # fmt: skip
    assert sorted(limit["rate"] for limit in after.machine["limits"]) == [1.0, 1.0, 7.0, 9.0]
    with pytest.raises(ValueError, match="update: the file's cpu is 'some', this run's 'other'"):
        before.updated(found([measured("b", 1, 9.0)], cpu="other"))


def test_a_file_has_a_record_a_line(tmp_path: Path) -> None:
    results = found([measured("a", 1, 1.0), measured("b", 2, 1.5)])
    results.save(tmp_path / "results.json")
    lines = [line.strip().rstrip(",") for line in (tmp_path / "results.json").read_text().splitlines()]
    records = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    of_machine, points = results.machine["limits"], [p.to_dict() for p in results.scaling]
    assert records == [*of_machine, *(m.to_dict() for m in results.measurements), *points]
    assert list(records[2]) == list(measured("a", 1, 1.0).to_dict())
    assert '"cpu": "some"' in lines


def test_the_published_results_are_still_read() -> None:
    published = Results.load(Path(__file__).parents[2] / "benchmarks" / "results.json")
    assert published.machine["device"] == "cpu"
    assert {m.timing for m in published.measurements} == {"cpu"}
    newer = replace(published, measurements=[replace(m, median=1.0) for m in published.measurements[:1]])
    assert published.updated(newer).measurements[0].median == 1.0
    with pytest.raises(ValueError, match="update: the file's device is 'cpu', this run's 'a GPU'"):
        published.updated(replace(newer, machine={**newer.machine, "device": "a GPU"}))
