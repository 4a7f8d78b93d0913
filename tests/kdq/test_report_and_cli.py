"""report, the demo on a tiny setting, and the command line as a user calls it."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import kdq
from kdq.demo import PRECISIONS, Settings, run_digits
from kdq.place import changed_copy, place_of


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5)).eval()


def loader() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(20, 12, generator=generator), torch.arange(20) % 5) for _ in range(3)]


def run_cli(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from kdq.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=600)


def test_report_numbers(tmp_path: Path) -> None:
    teacher, student = model(), model()
    same = kdq.report(model(), teacher, loader())
    assert same.agreement == 1
    assert same.teacher_kl == pytest.approx(0, abs=1e-9)
    assert same.samples == 60
    kdq.quantize_(student, kdq.Int8Dynamic())
    result = kdq.report(student, teacher, loader())
    logits = torch.cat([student(x) for x, _ in loader()])
    target = torch.cat([y for _, y in loader()])
    assert result.accuracy == pytest.approx(float((logits.argmax(1) == target).double().mean()))
    assert [layer.name for layer in result.layers] == ["0", "2"]
    assert all(30 < layer.sqnr_db < 80 for layer in result.layers)
    assert result.latency.fastest <= result.latency.median <= result.latency.slowest
    assert "SQNR" in str(result)
    result.save_json(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["samples"] == 60
    result.plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_labels_and_with_mistakes() -> None:
    teacher = model()
    assert kdq.report(model(), teacher, [x for x, _ in loader()]).accuracy is None
    with pytest.raises(ValueError, match="loader"):
        kdq.report(model(), teacher, [])
    with pytest.raises(ValueError, match="shape"):
        kdq.report(nn.Sequential(model(), nn.Linear(5, 4)), teacher, loader())


@pytest.fixture(scope="module")
def demo_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("demo")
    run_digits(folder, Settings.quick(seeds=2), Console(quiet=True))
    return folder


def test_demo_report(demo_output: Path) -> None:
    content = json.loads((demo_output / "report.json").read_text())
    assert [row["precision"] for row in content["summary"]] == ["float32", *PRECISIONS]
    sizes = [row["size_bytes"] for row in content["summary"]]
    assert sizes == sorted(sizes, reverse=True), "fewer bits take fewer bytes"
    assert len(content["results"]) == 2 * (2 + 2 * len(PRECISIONS))
    for result in content["results"]:
        assert result["kernel_agreement"] > 0.98
        assert math.isfinite(result["teacher_kl"])
    for row in content["summary"][1:]:
        pairs: dict[str, list[float]] = {
            arm: [
                100 * r["accuracy"] for r in content["results"] if (r["precision"], r["arm"]) == (row["precision"], arm)
            ]
            for arm in ("labels", "teacher")
        }
        gains = [b - a for a, b in zip(pairs["labels"], pairs["teacher"], strict=True)]
        assert row["gain"][0] == pytest.approx(sum(gains) / 2)
    assert (demo_output / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_demo_checkpoints_load_and_say_what_they_are(demo_output: Path) -> None:
    kinds = {"int8": "Int8Linear", "4-bits": "LowBitLinear", "2-bits": "LowBitLinear", "1-bit": "BinaryLinear"}
    for name, kind in kinds.items():
        loaded = kdq.load(demo_output / "checkpoints" / f"{name}-teacher-seed1.safetensors")
        assert sum(type(module).__name__ == kind for module in loaded.modules()) == 3
        assert loaded(torch.rand(3, 64)).shape == (3, 10)


def test_demo_is_reproducible(demo_output: Path, tmp_path: Path) -> None:
    run_digits(tmp_path, Settings.quick(seeds=1), Console(quiet=True))
    first = json.loads((demo_output / "report.json").read_text())["results"]
    again = json.loads((tmp_path / "report.json").read_text())["results"]
    assert again == [result for result in first if result["seed"] == 0]


@pytest.mark.parametrize("name", ["digits", "language"])
def test_demo_refuses_a_device_that_is_none(tmp_path: Path, name: str) -> None:
    for device, error in (
        ("toaster", "error: device: expected cpu, cuda or cuda:N, got 'toaster'"),
        ("meta", "error: device: expected cuda or cuda:N, got meta"),
        ("cuda:7", "error: device: "),  # no such GPU, or no operators for any
    ):
        wrong = run_cli("demo", name, "--quick", "--device", device, "--out", "out", cwd=tmp_path)
        assert wrong.returncode == 1
        assert error in wrong.stderr
        assert not (tmp_path / "out").exists()


def test_a_changed_copy_leaves_the_model_as_it_is() -> None:
    before = model()
    after = changed_copy(before, partial(kdq.quantize_, config=kdq.Int8Dynamic()), place_of("cpu"))
    assert [type(m) for m in before.modules() if isinstance(m, nn.Linear)]
    assert not [m for m in after.modules() if isinstance(m, nn.Linear)]


def test_cli_info_and_errors(tmp_path: Path) -> None:
    result = run_cli("info", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "isa in force" in result.stdout
    wrong = run_cli("bench", "--family", "int3", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "error: family" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_cli_report(tmp_path: Path) -> None:
    teacher = model()
    student: Any = copy.deepcopy(teacher)
    kdq.quantize_(student, kdq.Int8Dynamic())
    kdq.save(teacher, tmp_path / "teacher")
    kdq.save(student, tmp_path / "student")
    (tmp_path / "mydata.py").write_text("import torch\ndef batches():\n    return [torch.zeros(4, 12)]\n")
    arguments = ("report", "student", "teacher", "--data", "mydata:batches", "--json", "out.json", "--plot", "out.png")
    result = run_cli(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out.json").read_text())["samples"] == 4
    missing = run_cli("report", "student", "teacher", "--data", "mydata:nothing", cwd=tmp_path)
    assert missing.returncode == 1
    assert "mydata:nothing" in missing.stderr
