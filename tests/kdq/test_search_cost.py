"""The search's times, on a clock that models turn by what they compute: sums must be exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import kdq
from kdq.observe import parse_batch
from kdq.search import cost
from kdq.search.cost import measure, whole_ms
from kdq.search.precision import BuiltLayers, all_at

INT8, BINARY = kdq.Int8Dynamic(), kdq.Binary()
CANDIDATES = [None, INT8, BINARY]
KINDS = {nn.Linear: None, kdq.Int8Linear: INT8, kdq.BinaryLinear: BINARY}
LAYER_MS = {None: 5.0, INT8: 2.0, BINARY: 0.2}  # of a layer of each kind
RELU_MS = {None: 0.75, INT8: 0.5, BINARY: 0.125}  # of what follows it: it finds other caches


class Clock:
    """Milliseconds that linear layers and ReLUs have taken; as a module, what `time` is to the search."""

    def __init__(self) -> None:
        self.ms, self.last = 0.0, None

    def perf_counter(self) -> float:
        return self.ms / 1e3

    def after(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if type(module) in KINDS:
            self.last = KINDS[type(module)]
            self.ms += LAYER_MS[self.last]
        elif isinstance(module, nn.ReLU):
            self.ms += RELU_MS[self.last]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(cost, "time", clock)
    handle = nn.modules.module.register_module_forward_hook(clock.after)
    yield clock
    handle.remove()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def total(configs: list[Any]) -> float:
    return sum(LAYER_MS[c] for c in configs) + sum(RELU_MS[c] for c in configs[:-1])


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("candidates", [CANDIDATES, [None], [BINARY, INT8]])
def test_uniform_plans_add_up_to_what_the_whole_model_takes(candidates: list[Any]) -> None:
    """Also where the rest of the model takes longer at one precision than at another."""
    student, names = model(), ["0", "2", "4"]
    batch = parse_batch(torch.randn(3, 12), student)
    built = BuiltLayers(student, [torch.randn(3, 12)])
    timing = measure(student, built, names, candidates, batch, rounds=2)
    fastest = min(candidates, key=LAYER_MS.get)
    assert timing.fixed == pytest.approx(2 * RELU_MS[fastest])
    for config in candidates:
        ms = timing.layers[config]
        assert timing.fixed + sum(ms.values()) == pytest.approx(total([config] * 3))
        assert ms["0"] == pytest.approx(ms["2"]) == pytest.approx(ms["4"])
        with all_at(built, dict.fromkeys(names, config)):
            assert whole_ms(student, batch, 2) == pytest.approx(total([config] * 3))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("sensitivity", ["teacher_kl", "weight_sqnr"])
def test_a_plan_within_a_time_tells_what_it_takes(sensitivity: str) -> None:
    x, student = torch.randn(20, 12), model()
    options = {"candidates": CANDIDATES, "rounds": 2, "progress": False, "sensitivity": sensitivity}
    plan = kdq.search_precision(student, model(), [x], budget=kdq.Budget(latency_ms=11.0), **options)
    chosen = [layer.option.config for layer in plan.layers]
    assert len(set(chosen)) > 1
    assert plan.latency_ms <= 11
    assert plan.measured_latency_ms == pytest.approx(total(chosen))
    assert plan.measured_latency_ms == pytest.approx(plan.latency_ms, rel=0.05)  # no ReLU follows the last layer
    assert f"{plan.measured_latency_ms:.4f}" in str(plan)
    assert kdq.Plan.from_json(plan.to_json()) == plan
    assert all(type(module) in (nn.Linear, nn.ReLU) for module in student)
    for other in (plan.replace({"0": BINARY}), plan.under(kdq.Budget(average_bits=16))):
        assert other.measured_latency_ms is None
    sized = kdq.search_precision(student, model(), [x], budget=kdq.Budget(average_bits=16), **options)
    assert sized.measured_latency_ms is None


@pytest.mark.usefixtures("clock")
def test_the_smallest_reachable_time_is_that_of_the_fastest_model() -> None:
    least = f"{total([BINARY] * 3):.6f}"
    with pytest.raises(ValueError, match=f"latency_ms=0.8 cannot be met, the smallest is {least}"):
        kdq.search_precision(
            model(), model(), [torch.randn(20, 12)], budget=kdq.Budget(latency_ms=0.8), candidates=CANDIDATES
        )
