"""Binary layers that see inputs that are never negative put out a constant: who makes one is warned."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import kdq
from small_models import INT8, ONE, randn

BEHIND_RELU: dict[str, Callable[[], list[nn.Module]]] = {
    "1": lambda: [nn.ReLU(), nn.Linear(6, 4)],
    "3": lambda: [nn.ReLU(), nn.Dropout(0.1), nn.Identity(), nn.Linear(6, 4)],
    "1.0": lambda: [nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Sequential(nn.Linear(6, 4), nn.Tanh())],
}


def test_a_warning_tells_the_users_line() -> None:
    """Not one of kdq's or torch's, however deep the warning was given."""

    def places(act: Callable[[], object]) -> list[tuple[str, int]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act()
        return [(w.filename, w.lineno) for w in caught if "Binary layer" in str(w.message)]

    def line_of(act: Callable[[], object]) -> list[tuple[str, int]]:
        return [(__file__, act.__code__.co_firstlineno)]

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))

    def student() -> nn.Module:
        model = net()
        kdq.prepare_qat_(model, {"2": ONE})
        return model

    distiller = kdq.Distiller(net(), student(), [kdq.SoftTargets()])
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    for act in (
        lambda: kdq.quantize_(net(), {"2": ONE}),
        lambda: kdq.convert_(net(), {"2": ONE}),
        lambda: student()(randn(9, 6)),
        lambda: distiller.fit([randn(9, 6)], 1, optimizer, progress=False),
    ):
        assert places(act) == line_of(act)


def warned(act: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("name", BEHIND_RELU)
def test_quantize_warns_of_a_relu_right_before(name: str) -> None:
    model = nn.Sequential(*BEHIND_RELU[name]()).eval()
    (said,) = warned(lambda: kdq.quantize_(model, {name: ONE}))
    assert repr(name) in said
    assert "norm right before it" in said
    out = model(randn(9, 6))
    assert torch.equal(out, out[:1].expand_as(out)), "what the warning says"


def test_quantize_warns_of_a_relu_that_a_layer_computes() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    assert not warned(lambda: kdq.quantize_(model, {"0": INT8}))
    (said,) = warned(lambda: kdq.convert_(model, {"2": ONE}))
    assert "'2' is a Binary layer" in said


@pytest.mark.parametrize("between", [nn.LayerNorm(6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Tanh()], ids=str)
def test_quantize_does_not_warn_where_signs_differ(between: nn.Module) -> None:
    class Own(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) - 1

    for before in (nn.Sequential(nn.ReLU(), between), Own(nn.ReLU())):
        assert not warned(lambda: kdq.quantize_(nn.Sequential(before, nn.Linear(6, 4)), {"1": ONE}))  # noqa: B023
    assert not warned(lambda: kdq.quantize_(nn.Sequential(nn.ReLU(), nn.Linear(6, 4)), INT8))


def test_a_twin_warns_of_its_first_batch_only() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc2(torch.relu(self.fc1(x)))
            return out

    student = Net()
    assert not warned(lambda: kdq.prepare_qat_(student, ONE))
    fresh = copy.deepcopy(student)
    (said,) = warned(lambda: student(randn(9, 6)))
    assert "'fc2' is a Binary layer and got a first batch without a negative value" in said
    assert not warned(lambda: student(randn(9, 6)))
    assert not warned(lambda: torch.compile(fresh, fullgraph=True, backend="eager")(randn(9, 6)))
    switchable = Net()
    kdq.prepare_switchable_(switchable, [INT8, ONE])
    assert not warned(lambda: switchable(randn(9, 6)))
    kdq.set_precision_(switchable, ONE)
    (said,) = warned(lambda: switchable(randn(9, 6)))
    assert "'fc2'" in said
