"""Post-training tools for float models, which compute the same afterwards and lose less when they are quantized."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq.configs import Config
from ptq_cases import mlp, randn
from small_models import relative_error


def quantized_error(model: nn.Module, config: Config, x: Tensor, expected: Tensor) -> float:
    """Of a quantized copy, on the data that calibrate it."""
    m = copy.deepcopy(model).eval()
    kdq.quantize_(m, config, calibration=[x])
    with torch.no_grad():
        return relative_error(m(x), expected)


# ---- fold_batch_norm_ ------------------------------------------------------------------------------------------------


def trained_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
                module.weight.copy_(randn(module.num_features, seed=3).exp())
                module.bias.copy_(randn(module.num_features, seed=4))
        for _ in range(5):
            model(x)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fold_computes_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.BatchNorm1d(9),
        nn.Linear(9, 12, bias=False),
        nn.Identity(),
        nn.BatchNorm1d(12, affine=False),
        nn.ReLU(),
        nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 7)),
        nn.BatchNorm1d(7),
        nn.Tanh(),
        nn.BatchNorm1d(7),
    ).to(dtype)
    x = randn(50, 9).to(dtype) * 3 + 1
    trained_statistics(model, x)
    expected = model(x)
    names = [name for name, _ in model.named_modules()]
    report = kdq.fold_batch_norm_(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-9)
    assert set(report.changed) == {"0", "3", "5.0", "6"}
    assert "Tanh" in report.left["8"]
    assert [name for name, _ in model.named_modules()] == names
    assert type(model[5][0]) is nn.Identity
    assert "5.0" in str(report)


def test_fold_into_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6),
        nn.Conv2d(6, 2, 3, padding=1),
    )  # fmt: skip
    x = randn(5, 4, 8, 8)
    trained_statistics(model, x)
    expected = model(x)
    report = kdq.fold_batch_norm_(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert set(report.changed) == {"1"}
    assert "ReLU" in report.left["3"], "zero padding does not go through an offset"


def test_fold_leaves_what_it_does_not_know() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(
        shared, nn.BatchNorm1d(4), shared, nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)
    )
    model.append(nn.ModuleList([nn.BatchNorm1d(4)]))
    before = copy.deepcopy(model.state_dict())
    report = kdq.fold_batch_norm_(model)
    assert not report.changed
    assert "elsewhere" in report.left["1"]
    assert "statistics" in report.left["5"]
    assert "Sequential" in report.left["6.0"]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_fold_is_all_or_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[3].running_var.fill_(-1.0)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="2: .*NaN"):
        kdq.fold_batch_norm_(model)
    assert torch.equal(model[0].weight, before)
    assert type(model[1]) is nn.BatchNorm1d


# ---- equalize_ -------------------------------------------------------------------------------------------------------


def unbalance(first: nn.Linear, second: nn.Linear, seed: int = 2) -> None:
    """Multiplies channels by factors of a wide spread and takes them back: the same function in floats."""
    factor = (randn(first.out_features, seed=seed) * 1.5).exp()
    with torch.no_grad():
        first.weight.mul_(factor[:, None])
        first.bias.mul_(factor)
        second.weight.div_(factor)


@pytest.mark.parametrize("named", [False, True])
def test_equalizing_mends_uneven_channels(named: bool) -> None:
    model: Any = mlp()
    x = randn(300, 24)
    expected = model(x).detach()
    even = quantized_error(model, kdq.LowBit(weight_bits=4, act_bits=8), x, expected)
    unbalance(model[0], model[2][0])
    unbalance(model[2][0], model[3], seed=3)
    uneven = quantized_error(model, kdq.LowBit(weight_bits=4, act_bits=8), x, expected)
    report = kdq.equalize_(model, [("0", "2.0"), ("2.0", "3")] if named else None)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert set(report.changed) == {"0", "2.0"}
    mended = quantized_error(model, kdq.LowBit(weight_bits=4, act_bits=8), x, expected)
    assert uneven > 2 * even
    assert mended < 0.6 * uneven
    ours, theirs = model[0].weight.abs().amax(1), model[2][0].weight.abs().amax(0)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-6)


def test_equalize_stops_at_other_activations_and_shared_layers() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), shared, nn.ReLU(), shared)
    report = kdq.equalize_(model)
    assert not report.changed
    assert "GELU" in report.left["0"]
    assert "elsewhere" in report.left["2"]
    for pairs, error, message in (
        ([("0", "nowhere")], ValueError, "no layer 'nowhere'"),
        ([("0", "1")], ValueError, "GELU"),
        ([("0", "0")], ValueError, "follow each other"),
        ([("0",)], TypeError, "pairs"),
    ):
        with pytest.raises(error, match=message):
            kdq.equalize_(model, pairs)  # type: ignore[arg-type]


def test_channels_of_zeros_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:, 2] = 0
    x = randn(9, 4)
    expected = model(x)
    kdq.equalize_(model)
    kdq.smooth_(model, [x])
    torch.testing.assert_close(model(x), expected)


# ---- smooth_ ---------------------------------------------------------------------------------------------------------


def test_smoothing_mends_outlier_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 16))
    with torch.no_grad():
        model[0].weight[[3, 17]] = 80.0
        model[1].weight[:, [3, 17]] /= 80.0
    x = randn(300, 48)
    expected = model(x).detach()
    before = quantized_error(model, kdq.Int8Static(), x, expected)
    report = kdq.smooth_(model, [x[:150], x[150:]])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert set(report.changed) == {"1", "3"}
    assert quantized_error(model, kdq.Int8Static(), x, expected) < 0.4 * before


def test_smoothing_is_the_papers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3))
    x = randn(40, 5)
    inputs, weight = model[0](x).abs().amax(0), model[1].weight.detach().clone()
    kdq.smooth_(model, [x], alpha=0.7)
    s = inputs**0.7 / weight.abs().amax(0) ** 0.3
    torch.testing.assert_close(model[1].weight, weight * s)
    torch.testing.assert_close(model[0].weight, 1 / s)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_what_is_legal_in_a_transformer(norm_first: bool, activation: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = randn(3, 6, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        expected = model(x)
        report = kdq.smooth_(model, [x])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    legal = {part for part, yes in (("linear1", norm_first), ("linear2", activation == "relu")) if yes}
    assert set(report.changed) == {f"layers.{i}.{part}" for i in range(2) for part in legal}
    assert ("residual" in report.left.get("layers.0.linear1", "")) is not norm_first
    assert "self_attn.out_proj" in str(report.left)


@pytest.mark.parametrize("norm_first", [False, True])
def test_opened_attention_is_smoothed(norm_first: bool) -> None:
    """Three projections behind one norm share its factors; out_proj's go into v_proj, which feeds it alone."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().requires_grad_(False)
    for norm in (model.layers[0].norm1, model.layers[1].norm1):
        norm.weight[[3, 11]] = 60.0
    kdq.open_attention_(model)
    for attention in (model.layers[0].self_attn, model.layers[1].self_attn):
        for name in ("q_proj", "k_proj", "v_proj"):
            attention.get_submodule(name).weight[:, [3, 11]] /= 60.0
    x = randn(20, 6, 16)
    expected = model(x)
    before = quantized_error(model, kdq.Int8Static(), x, expected)
    report = kdq.smooth_(model, [x])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    projections = {f"layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkv"}
    assert report.changed.keys() >= {"layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj"}
    assert (report.changed.keys() >= projections) is norm_first
    if norm_first:
        assert quantized_error(model, kdq.Int8Static(), x, expected) < 0.6 * before
    else:
        assert all("the residual sum reads its input too" in report.left[name] for name in projections)


def test_a_projection_that_is_left_keeps_the_others_from_being_smoothed() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True).eval()
    model = nn.Sequential(layer).requires_grad_(False)
    kdq.open_attention_(model)
    kdq.quantize_(model, {"*.k_proj": kdq.Int8Dynamic()})
    x = randn(3, 6, 16)
    expected = model(x)
    report = kdq.smooth_(model, [x])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert "0.self_attn.k_proj, which reads the same, is left" in report.left["0.self_attn.q_proj"]
    assert "0.self_attn.v_proj" in report.left
    assert "0.self_attn.out_proj" in report.changed


def test_smoothing_refuses_what_it_does_not_know() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4), nn.LayerNorm(4, elementwise_affine=False))
    model.append(nn.Linear(4, 2))
    report = kdq.smooth_(model, [randn(5, 4)])
    assert not report.changed
    assert set(report.left) == {"0", "2", "4"}
    with pytest.raises(ValueError, match="alpha"):
        kdq.smooth_(model, [randn(5, 4)], alpha=1.5)
