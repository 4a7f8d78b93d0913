"""Post-training tools that mend what plain rounding spoils; errors change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq.configs import Config
from ptq_cases import mlp, randn
from small_models import relative_error

W3A8 = kdq.LowBit(weight_bits=3, act_bits=8)


# ---- reestimate_batch_norm_ ------------------------------------------------------------------------------------------


def test_reestimated_statistics_are_the_average_of_the_batches() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.9))
    model[2].eval()
    loader = [randn(8, 5, seed=s) * (s + 1) for s in range(3)]
    hidden = [model[0](x).detach() for x in loader]
    model.train()
    modes = [m.training for m in model.modules()]
    report = kdq.reestimate_batch_norm_(model, loader)
    torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert model[1].momentum == 0.1
    assert [m.training for m in model.modules()] == modes
    assert list(report.changed) == ["1"]


def test_reestimating_mends_a_quantized_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 32), nn.BatchNorm1d(32))
    x = randn(2000, 24)
    kdq.reestimate_batch_norm_(model, [x])
    expected = model.eval()(x).detach()
    kdq.quantize_(model, kdq.LowBit(weight_bits=2, act_bits=3), calibration=[x])
    before = relative_error(model(x).detach(), expected)
    kdq.reestimate_batch_norm_(model, list(x.split(500)))
    assert relative_error(model(x).detach(), expected) < 0.9 * before


def test_reestimate_restores_on_errors() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    model(randn(4, 3))
    before = copy.deepcopy(model.state_dict())
    for loader, message in (([], "at least one batch"), ([randn(4, 3), randn(1, 3)], "more than 1 value")):
        with pytest.raises(ValueError, match=message):
            kdq.reestimate_batch_norm_(model, loader)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
        assert not model[0].training


# ---- correct_bias_ ---------------------------------------------------------------------------------------------------


def test_bias_correction_mends_the_mean() -> None:
    model: Any = mlp()
    model[3] = nn.Linear(64, 16, bias=False)
    x = randn(500, 24).abs() + 1
    reference = copy.deepcopy(model)
    expected = reference(x).detach()
    kdq.quantize_(model, W3A8, calibration=[x])
    before = relative_error(model(x), expected)
    report = kdq.correct_bias_(model, reference, list(x.split(99)))
    got = model(x)
    torch.testing.assert_close(got.mean(0), expected.mean(0), rtol=1e-4, atol=1e-4)
    assert relative_error(got, expected) < 0.5 * before
    assert list(report.changed) == ["0", "2.0", "3"]
    assert torch.equal(copy.deepcopy(model)(x), got)


def test_bias_correction_is_all_or_nothing() -> None:
    model = mlp()
    reference = copy.deepcopy(model)
    reference[3] = nn.Linear(64, 17)
    kdq.quantize_(model, W3A8, calibration=[randn(30, 24)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'3' puts out 17"):
        kdq.correct_bias_(model, reference, [randn(30, 24)])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="reference has no layer '2.0'"):
        kdq.correct_bias_(model, nn.Sequential(nn.Linear(24, 64)), [randn(30, 24)])


def test_bias_correction_refuses_the_model_before_its_batch_norms_were_folded() -> None:
    model = nn.Sequential(nn.Linear(24, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
    model(randn(300, 24) + 1)  # statistics
    unfolded = copy.deepcopy(model.eval())
    kdq.fold_batch_norm_(model)
    folded = copy.deepcopy(model)
    kdq.quantize_(model, kdq.Int8Dynamic())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="reference: '1' is a BatchNorm1d, which was folded in quantized"):
        kdq.correct_bias_(model, unfolded, [randn(30, 24)])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    kdq.correct_bias_(model, folded, [randn(30, 24)])


# ---- reconstruct_ ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [kdq.LowBit(weight_bits=2, act_bits=8), W3A8], ids=str)
def test_learned_rounding_beats_the_nearest(config: Config) -> None:
    model = mlp()
    mixing = randn(24, 24, seed=5)
    train, test = randn(1500, 24) @ mixing, randn(400, 24, seed=6) @ mixing
    expected = model(test).detach()
    nearest = copy.deepcopy(model)
    kdq.quantize_(nearest, config, calibration=[train])
    state = torch.get_rng_state()
    report = kdq.reconstruct_(model, config, train.split(500), steps=400)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(report.changed) == {"0", "2.0", "3"}
    layer: Any = model[0]
    assert isinstance(layer, kdq.LowBitLinear)
    assert (layer.int8_weight() - nearest[0].int8_weight()).abs().max() == 1
    assert relative_error(model(test), expected) < 0.8 * relative_error(nearest(test), expected)


@pytest.mark.parametrize("config", [kdq.Int8Dynamic(), kdq.Int8Static(), kdq.Int8WeightOnly()], ids=str)
def test_reconstruction_gives_int8_layers_too(config: Config) -> None:
    models = [mlp(), mlp()]
    for model in models:
        kdq.reconstruct_(model, config, iter([randn(200, 24)]), steps=5)
    x = randn(50, 24, seed=7)
    assert torch.equal(models[0](x), models[1](x)), "deterministic"
    assert isinstance(models[0][0], kdq.Int8Linear)
    assert relative_error(models[0](x), mlp()(x)) < 0.05


def test_reconstruction_in_a_transformer() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    x = randn(20, 6, 16)
    expected = model(x).detach()
    report = kdq.reconstruct_(model, kdq.LowBit(weight_bits=4, act_bits=8), [x], steps=30)
    assert len(report.changed) == 4
    with torch.no_grad():
        assert relative_error(model(x), expected) < 0.1


def test_reconstruction_is_all_or_nothing() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    model = Skips()
    for config, steps, message in (
        (kdq.Int8Dynamic(), 5, "unused: loader: no batch"),
        (kdq.Binary(), 5, "'used' gets Binary"),
        (kdq.LowBit(weight_bits=1, act_bits=4), 5, "sign"),
        (kdq.Int8Dynamic(), 0, "steps"),
    ):
        with pytest.raises(ValueError, match=message):
            kdq.reconstruct_(model, config, [randn(30, 4)], steps=steps)
        assert type(model.used) is nn.Linear
    kdq.reconstruct_(model, kdq.Int8Dynamic(), [randn(30, 4)], steps=5, filter_fn=lambda _, name: name == "used")
    assert isinstance(model.used, kdq.Int8Linear)


# ---- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tool",
    [
        kdq.reestimate_batch_norm_,
        kdq.smooth_,
        lambda model, loader: kdq.correct_bias_(model, copy.deepcopy(model), loader),
        lambda model, loader: kdq.reconstruct_(model, kdq.Int8Dynamic(), loader),
    ],
)
def test_a_loader_that_gives_nothing_is_an_error(tool: Callable[..., Any]) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="at least one batch, got none"):
        tool(model, iter([]))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
