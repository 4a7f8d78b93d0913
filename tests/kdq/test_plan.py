"""Budget and Plan: validation, totals, edits, JSON, and their use as a mapping of exact names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kdq
from kdq.configs import Config
from kdq.search import Option, PlannedLayer


def option(config: Config | None, bits: int, size: int, ms: float, sensitivity: float) -> Option:
    return Option(config=config, weight_bits=bits, size_bytes=size, latency_ms=ms, sensitivity=sensitivity)


def layer(*names: str, chosen: int = 0) -> PlannedLayer:
    options = (
        option(None, 32, 400, 1.0, 0.0),
        option(kdq.Int8Dynamic(), 8, 120, 0.1 + 0.2, 1e-7 / 3),
        option(kdq.LowBit(weight_bits=2, act_bits=8), 2, 48, 0.1, 0.125),
    )
    return PlannedLayer(names=names, in_features=8, out_features=4, rows=6, calls=2, options=options, chosen=chosen)


def plan() -> kdq.Plan:
    return kdq.Plan(
        layers=(layer("fc1", "tied", chosen=1), layer("fc[2]", chosen=2), layer("head")),
        fixed_bytes=10,
        fixed_ms=0.5,
        base_distance=0.25,
        measured_distance=0.3,
        sensitivity="teacher_kl",
        budget=kdq.Budget(average_bits=16.0),
    )


@pytest.mark.parametrize(
    ("bounds", "error"),
    [
        ({}, ValueError),
        ({"latency_ms": 0}, ValueError),
        ({"size_bytes": float("nan")}, ValueError),
        ({"average_bits": "3"}, TypeError),
        ({"size_bytes": True}, TypeError),
    ],
)
def test_budget_validates(bounds: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(bounds), "at least one")):
        kdq.Budget(**bounds)


def test_mapping_and_totals() -> None:
    p = plan()
    assert dict(p) == {
        "fc1": kdq.Int8Dynamic(),
        "tied": kdq.Int8Dynamic(),
        "fc[2]": kdq.LowBit(weight_bits=2, act_bits=8),
    }
    assert "head" not in p
    assert p.size_bytes == 10 + 120 + 48 + 400
    assert p.latency_ms == pytest.approx(0.5 + 0.3 + 0.1 + 1)
    assert p.average_bits == pytest.approx((8 + 2 + 32) / 3)
    assert p.distance == pytest.approx(0.25 + 1e-7 / 3 + 0.125)
    assert all(
        text in str(p) for text in ("fc1, tied", "Int8Dynamic", "float", "578", "tensor bytes: without the header")
    )


def test_replace_recomputes_totals() -> None:
    p = plan().replace({"tied": None, "head": kdq.Int8Dynamic()})
    assert set(p) == {"fc[2]", "head"}
    assert p.size_bytes == plan().size_bytes
    assert p.measured_distance is None
    with pytest.raises(ValueError, match="no layer 'fc9'.*'fc1'"):
        p.replace({"fc9": None})
    with pytest.raises(ValueError, match="'fc1': Binary.. was not costed.*float, Int8Dynamic"):
        p.replace({"fc1": kdq.Binary()})


def test_json_round_trip_is_exact(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    assert kdq.Plan.load(tmp_path / "plan.json") == plan()
    without = dataclasses.replace(plan(), budget=None, measured_distance=None)
    assert kdq.Plan.from_json(json.loads(json.dumps(without.to_json()))) == without


@pytest.mark.parametrize(
    "change",
    [{"version": 9}, {"layers": [{}]}, {"surplus": 1}, {"budget": {"latency_ms": -1}}, {"layers": 3}],
)
def test_load_refuses_what_is_no_plan(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**plan().to_json(), **change}))
    with pytest.raises(ValueError, match="plan.json: plan: not valid"):
        kdq.Plan.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="plan.json"):
        kdq.Plan.load(path)


class Odd(nn.Module):
    """Names that fnmatch would read as patterns: "fc[2]" matches "fc2" and not itself."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("fc1", "fc[2]", "fc2", "head"):
            self.add_module(name, nn.Linear(8, 8))
        self.tied = self.fc1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self._modules.values():
            assert module is not None
            x = module(x)
        return x


def test_names_are_exact_in_quantize_prepare_and_convert() -> None:
    x = torch.randn(4, 8)
    model = Odd()
    assert set(kdq.quantize_(model, plan(), calibration=[x]).changed) == {"fc1", "tied", "fc[2]"}
    assert type(model.fc2) is nn.Linear
    assert model.fc1 is model.tied
    model = Odd()
    assert set(kdq.prepare_qat_(model, plan()).changed) == {"fc1", "tied", "fc[2]"}
    model(x)
    assert set(kdq.convert_(model, plan()).changed) == {"fc1", "tied", "fc[2]"}


def test_names_are_exact_in_set_precision() -> None:
    model = Odd()
    kdq.prepare_switchable_(model, [kdq.Int8Static(), kdq.Int8Dynamic(), kdq.LowBit(weight_bits=2, act_bits=8)])
    before = kdq.precision_of(model)
    kdq.set_precision_(model, plan())
    assert kdq.precision_of(model) == {**before, "fc1": plan()["fc1"], "fc[2]": plan()["fc[2]"]}
    setattr(model, "fc[2]", nn.Identity())
    with pytest.raises(ValueError, match=r"precision: 'fc\[2\]' is neither the name of a layer"):
        kdq.set_precision_(model, plan())


def test_a_plan_for_another_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="config: 'fc1' is neither the name of a layer"):
        kdq.quantize_(model, plan())
    with pytest.raises(ValueError, match="plan: 'fc1' is neither the name of a layer"):
        kdq.convert_(model, dict(plan()))
    assert type(model[0]) is nn.Linear
