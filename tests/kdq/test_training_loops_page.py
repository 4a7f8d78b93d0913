"""docs/training-loops.md: every block of code on the page runs, each after the first one."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import kdq
from small_models import mlp, randn

PAGE = Path(__file__).parents[2] / "docs" / "training-loops.md"
FIRST, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
LIBRARIES = ("transformers", "accelerate", "lightning", "torch.utils.tensorboard")


class Classifier(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = mlp(width)

    def forward(self, features: Tensor) -> Tensor:
        y: Tensor = self.body(features)
        return y


def names() -> dict[str, Any]:
    """What the page takes for given."""
    teacher, student = Classifier(16), Classifier(8)
    x = randn(32, 6)
    dataset = [{"features": row, "labels": label} for row, label in zip(x, teacher(x).argmax(1), strict=True)]
    loader = DataLoader(dataset, batch_size=8, shuffle=True)
    return {
        "teacher": teacher,
        "student": student,
        "dataset": dataset,
        "loader": loader,
        "held_out": DataLoader(dataset),
    }


def needed(block: str) -> list[str]:
    return [library for library in LIBRARIES if re.search(rf"^(from|import) {re.escape(library)}\b", block, re.M)]


def test_the_page_has_all_loops() -> None:
    assert len(BLOCKS) == 8
    assert {library for block in BLOCKS for library in needed(block)} == set(LIBRARIES)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:the teacher is worse")
@pytest.mark.filterwarnings("ignore:.*fewer than the logging interval", "ignore:.*`isinstance.treespec")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: (needed(block) or ["torch"])[0])
def test_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in needed(block):
        try:
            importlib.import_module(library)
        except ImportError:
            pytest.skip(f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    given = names()
    before = copy.deepcopy(given["teacher"])
    exec(FIRST, given)
    x = torch.stack([row["features"] for row in given["dataset"]])
    start = float(given["distiller"].loss((x, before(x).argmax(1))).detach())
    exec(block, given)
    student = given["student"].eval()
    assert float(given["distiller"].loss((x, before(x).argmax(1))).detach()) < start
    assert all(torch.equal(a, b) for a, b in zip(given["teacher"].parameters(), before.parameters(), strict=True))
    kdq.convert_(student)
    assert student(x).shape == (32, 4)
    if "log.csv" in block:
        assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + 2 * (4 + 1)
