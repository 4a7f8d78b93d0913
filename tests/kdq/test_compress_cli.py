"""`kdq compress`: the command, and a process that is killed and taken up again."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kdq
from kdq.cli import app


@pytest.fixture(autouse=True)
def _quickly(monkeypatch) -> None:
    """Short rounds of timing, and no page: drawing takes most of a small run's time."""
    for module in ("kdq.search.cost", "kdq.reporting"):
        monkeypatch.setattr(f"{module}.ROUND_SECONDS", 1e-5)
    monkeypatch.setattr("kdq.compression.road.CompressionReport.save_html", lambda self, path: path.write_text(""))


JOB = """
import time, torch, kdq
from torch import nn

class Slow(list):
    def __iter__(self):
        for batch in list.__iter__(self):
            time.sleep(0.02)
            yield batch

def job():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
    return {"model": model, "loader": Slow([torch.randn(16, 8) for _ in range(3)]), "progress": False, "epochs": 9}

def with_budget():
    return {**job(), "budget": kdq.Budget(average_bits=2.0)}

def wrong():
    return 3
"""
SHORT = ["--epochs", "6", "--finetune-epochs", "2"]


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["compress", *arguments, *SHORT], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_command_line(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_job.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert "report.html" in command("my_job:with_budget")
    assert kdq.Plan.load("compressed/plan.json").average_bits <= 2
    assert len(json.loads(Path("compressed/report.json").read_text())["training"][0]["losses"]) == 6
    command("my_job:with_budget", "--average-bits", "5")
    assert kdq.Plan.load("compressed/plan.json").average_bits > 2
    with pytest.raises(ValueError, match="source: expected my_job:wrong to return a dict"):
        command("my_job:wrong")
    with pytest.raises(ValueError, match="budget: expected at least one"):
        command("my_job:job")


def test_a_process_that_is_killed_goes_on_to_the_same_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "killed_job.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["killed_job:job", "--average-bits", "4", "--out"]
    program = [sys.executable, "-c", "from kdq.cli import main; main()"]
    process = subprocess.Popen([*program, "compress", *arguments, "killed", *SHORT])
    try:
        while not list(Path("killed").glob("distil-*.pt")):
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert not json.loads(Path("killed/run.json").read_text())["distil"]["done"]
    command(*arguments, "killed")
    command(*arguments, "whole")
    assert Path("killed/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
