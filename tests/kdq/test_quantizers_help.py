"""What the training methods, the moving average and folding are good for: cases where rounding alone hurts.

The other observers and post-training tools have theirs in test_observers.py, test_ptq.py and test_ptq_float.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kdq
from kdq.search.cost import tensor_bytes
from small_models import randn, relative_error

# ---- training on the grid --------------------------------------------------------------------------------------------


def blobs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Twelve clouds of points in four classes: inputs and labels to train on, and held ones."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.2 * torch.randn(12, 16, generator=generator)
    cloud = torch.randint(0, 12, (2560,), generator=generator)
    x = centres[cloud] + torch.randn(2560, 16, generator=generator)
    return x[:512], cloud[:512] % 4, x[512:], cloud[512:] % 4


def classifier(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [nn.Linear(16, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(48, 4), nn.BatchNorm1d(4))


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        rows = torch.randint(0, len(x), (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module", params=[0, 1, 2])
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor, Tensor], float]:
    """A float model, its data, and its accuracy when it was trained on in float as long as the twins, then rounded."""
    model, data = classifier(request.param), blobs(request.param)
    x, y, *held = data
    train(model, x, y, 150, 1e-2)
    rounded = copy.deepcopy(model)
    train(rounded, x, y, 100, 5e-3)
    kdq.quantize_(rounded, {"[36]": kdq.LowBit(weight_bits=2, act_bits=2)}, calibration=[x])
    kdq.reestimate_batch_norm_(rounded, [x])  # that alone mends a part
    return model, data, accuracy(rounded, *held)


@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa"])
def test_two_bits_that_are_trained_beat_two_bits_that_are_rounded(trained: Any, method: str) -> None:
    """Of the layers after a ReLU: what PACT and DoReFa are made for. Measured on the converted model."""
    model, (x, y, *held), rounded = trained
    twin = copy.deepcopy(model)
    kdq.prepare_qat_(twin, {"[36]": kdq.LowBit(weight_bits=2, act_bits=2, method=method)})
    torch.manual_seed(0)
    train(twin, x, y, 100, 5e-3)
    kdq.convert_(twin)
    in_float, reached = accuracy(model, *held), accuracy(twin, *held)
    assert in_float - rounded > 0.01, "rounding hurts"
    assert reached - rounded > 0.4 * (in_float - rounded)


@pytest.mark.parametrize("seed", range(3))
def test_a_learned_zero_point_helps_where_inputs_are_not_positive(seed: int) -> None:
    """LSQ+ against LSQ: both start from a batch without negative values, as after a ReLU, so with zero point 0."""
    torch.manual_seed(seed)
    linear, x = nn.Linear(16, 8), randn(256, 16, seed=seed) - 0.5
    y = linear(x).detach()
    errors = []
    for learned in (True, False):
        model: Any = nn.Sequential(copy.deepcopy(linear))
        kdq.prepare_qat_(model, kdq.LowBit(weight_bits=4, act_bits=3))
        model(x.relu())
        zero_point = model[0].input_grid.zero_point
        assert zero_point.item() == 0
        zero_point.requires_grad_(learned)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        kdq.convert_(model)
        assert (int(model[0].input_zero_point) > 0) == learned
        errors.append(relative_error(model(x), y))
    assert errors[0] < 0.6 * errors[1]


# ---- an observer -----------------------------------------------------------------------------------------------------


def test_a_moving_average_forgets_a_batch_of_outliers() -> None:
    """Which MinMax takes for the range for ever."""
    batches = [randn(64, 24, seed=s) for s in range(60)]
    clean, held = list(batches), randn(500, 24, seed=99)
    batches[5] = 50 * batches[5]
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(24, 16))
    expected = linear(held).detach()

    def error(observer: Any, calibration: list[Tensor]) -> float:
        model = copy.deepcopy(linear)
        kdq.quantize_(model, kdq.LowBit(weight_bits=8, act_bits=4), calibration=calibration, observer=observer)
        return relative_error(model(held), expected)

    assert error(kdq.MinMax(), batches) > 5 * error(kdq.MinMax(), clean)
    assert error(kdq.MovingAverage(), batches) < 1.1 * error(kdq.MinMax(), clean)


# ---- folding ---------------------------------------------------------------------------------------------------------


def spread(norm: nn.BatchNorm1d) -> Tensor:
    """Gives a norm factors from a hundredth to fifty or so."""
    with torch.no_grad():
        norm.weight.copy_((1.5 * randn(norm.num_features, seed=3)).exp())
        norm.bias.copy_(randn(norm.num_features, seed=4))
    return norm.weight.detach()


class Ops(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config", [kdq.Int8Dynamic(), kdq.LowBit(weight_bits=3, act_bits=8), kdq.LowBit(weight_bits=2, act_bits=4)], ids=str
)
def test_folding_into_the_layer_before_costs_no_bit_of_quality(config: Any) -> None:
    """Weights have a scale per output channel: however wide the factors are, the integers stay. What is gained are the
    norm's pass over memory and its tensors."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(24, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.BatchNorm1d(32))
    x = randn(500, 24)
    for norm in (model[1], model[4]):
        spread(norm)
    kdq.reestimate_batch_norm_(model, [x])
    folded = copy.deepcopy(model.eval())
    kdq.fold_batch_norm_(folded)
    with torch.no_grad(), Ops() as before:
        kdq.quantize_(model, config, calibration=[x])
        before.names.clear()
        expected = model(x)
    with torch.no_grad(), Ops() as after:
        kdq.quantize_(folded, config, calibration=[x])
        after.names.clear()
        got = folded(x)
    assert relative_error(got, expected) < 1e-5
    norms = [name for name in before.names if "batch_norm" in name]
    assert len(norms) == 2
    assert not [name for name in after.names if "batch_norm" in name]
    assert len(after.names) <= len(before.names) - 2
    # weight, bias, mean and variance of each norm go, and its count of batches; the first layers' biases were there
    assert tensor_bytes(model) - tensor_bytes(folded) == 4 * 4 * (64 + 32) + 2 * 8


def test_folding_into_the_layer_after_mends_a_spread_between_the_two() -> None:
    """Inputs have one scale a tensor: channels that the norm makes large, and the next layer small again, hurt."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.BatchNorm1d(48), nn.Linear(48, 32))
    factor = spread(model[0])
    with torch.no_grad():
        model[1].weight.div_(factor)
    x = randn(500, 48)
    kdq.reestimate_batch_norm_(model, [x])
    expected = model.eval()(x).detach()
    folded = copy.deepcopy(model)
    kdq.fold_batch_norm_(folded)
    errors = []
    for quantized in (model, folded):
        kdq.quantize_(quantized, kdq.LowBit(weight_bits=4, act_bits=8), calibration=[x])
        errors.append(relative_error(quantized(x), expected))
    assert errors[0] > 0.5, "rounding hurts"
    assert errors[1] < 0.2 * errors[0]
