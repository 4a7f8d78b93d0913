"""search_precision's file of times: measured once, and refused where it is of something else."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import kdq
from kdq.search import run

CANDIDATES = [None, kdq.Int8Dynamic(), kdq.LowBit(weight_bits=2, act_bits=8)]


def search(path: Path, widths: tuple[int, ...] = (12, 8, 4), rows: int = 8, **changed: object) -> kdq.Plan:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    options = {"budget": kdq.Budget(average_bits=16), "candidates": CANDIDATES, "rounds": 1, **changed}
    return kdq.search_precision(
        nn.Sequential(*layers),
        nn.Linear(12, widths[-1]),
        [torch.randn(rows, 12)],
        times=path,
        progress=False,
        **options,
    )


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdq.search.cost.ROUND_SECONDS", 1e-5)


def test_what_a_file_has_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "not" / "there" / "times.json"
    first = search(path)
    monkeypatch.setattr(run, "measure", lambda *_args: pytest.fail("measured again"))
    assert search(path) == first
    smaller = search(path, budget=kdq.Budget(average_bits=8))
    times = [[[o.latency_ms for o in layer.options] for layer in plan.layers] for plan in (first, smaller)]
    assert times[0] == times[1]
    assert smaller.fixed_ms == first.fixed_ms


def test_a_place_that_cannot_be_shows_before_the_times_are_measured(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(run, "measure", lambda *_args: pytest.fail("measured"))
    with pytest.raises(FileExistsError, match="file"):
        search(tmp_path / "file" / "times.json")


def test_a_file_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "times.json"
    search(path)
    before = path.read_text()
    for changed in ({"widths": (12, 8, 6, 4)}, {"candidates": CANDIDATES[:2]}):
        with pytest.raises(ValueError, match=r"times: .*times\.json is of other layers or candidates"):
            search(path, **changed)
    for changed in ({"rows": 9}, {"widths": (12, 7, 4)}):
        with pytest.raises(
            ValueError, match=r"times\.json is of layer '0' \(sides, dtype, rows\) \[8, 12, .* 8\], expected"
        ):
            search(path, **changed)
    for place, other in (("torch.get_num_threads", 97), ("kdq_kernels.cpu_isa", "abacus")):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda other=other: other)
            with pytest.raises(ValueError, match=rf"times\.json is of (threads|cpu_isa) \w+, expected {other}; choose"):
                search(path)
    assert path.read_text() == before
    for text in ("{", "[]", "{}", '{"layers": [[null, 3]], "fixed": 0}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"times: .*times\.json is not a file of times; delete it"):
            search(path)
