"""PACT and DoReFa-Net: their papers' formulas and gradients, and parity with the packed layers on integers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kdq
import kdq_kernels as kk
from kdq.configs import config_from_json, config_to_json
from kdq.layers import DoReFaQATLinear, PACTQATLinear

configs = st.one_of(
    st.builds(lambda w, a: kdq.LowBit(weight_bits=w, act_bits=a, method="pact"), st.integers(1, 8), st.integers(2, 8)),
    st.builds(lambda w: kdq.LowBit(weight_bits=w, act_bits=w + 1, method="dorefa"), st.integers(2, 7)),
)
both = pytest.mark.parametrize("method", ["pact", "dorefa"])


def prepared(config: kdq.LowBit, n: int = 12, k: int = 40, bias: bool = True, seed: int = 0) -> tuple[Any, Tensor]:
    """A model after a few steps of training, and data."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(k, n, bias=bias))
    x = torch.randn(23, k) + 0.3
    kdq.prepare_qat_(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval(), x


@settings(max_examples=40, deadline=None)
@given(config=configs, n=st.integers(1, 30), k=st.integers(1, 100), bias=st.booleans(), seed=st.integers(0, 2**31))
def test_integers_are_equal_and_outputs_agree(config: kdq.LowBit, n: int, k: int, bias: bool, seed: int) -> None:
    model, x = prepared(config, n, k, bias, seed)
    with torch.no_grad():
        expected, rounded = model(x), model[0].rounded_weight()
        kdq.convert_(model)
        real = model[0]
        weight = (rounded.double() / real.weight_scale.double()[:, None]).round()
        assert torch.equal(real.int8_weight().double(), weight)
        assert torch.equal(kk.unpack_int8_weight(real.packed), real.int8_weight())
        q = kk.quantize(x, real.input_scale, real.input_zero_point, quant_min=0, quant_max=2**config.act_bits - 1)
        exact = q.double() @ weight.t() * real.input_scale.double() * real.weight_scale.double()
        exact = exact if real.bias is None else exact + real.bias.double()
        got = model(x)
    assert int(real.input_zero_point) == 0
    size = float(expected.abs().max()) + 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * size)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("bits", range(2, 8))
def test_dorefa_is_the_papers(bits: int) -> None:
    model, x = prepared(kdq.LowBit(weight_bits=bits, act_bits=bits, method="dorefa"))
    twin = model[0]
    n = 2**bits - 1
    w = twin.weight.detach().double().tanh()
    r = w / (2 * w.abs().max()) + 0.5
    steps = (r * n).round()
    near_tie = (r * n - (r * n).floor() - 0.5).abs() < 1e-5
    torch.testing.assert_close(twin.rounded_weight().double()[~near_tie], (2 * steps / n - 1)[~near_tie])
    kdq.convert_(model)
    integers = model[0].int8_weight()
    assert torch.equal(integers.abs() % 2, torch.ones_like(integers))
    assert integers.abs().max() == n
    assert model[0].weight.shape == (12, -(-40 * bits // 8)), "takes its bits, and no more"
    clipped = (x.double().clamp(0, 1) * n).round() / n
    torch.testing.assert_close(
        model(x).double(), clipped @ (integers.double() / n).t() + twin.bias.double(), rtol=1e-4, atol=1e-5
    )


def test_dorefa_gradients_go_through_tanh_maximum_and_clip() -> None:
    model, _ = prepared(kdq.LowBit(weight_bits=3, act_bits=4, method="dorefa"), 5, 7)
    twin = model[0]
    x = (torch.randn(9, 7) * 2).requires_grad_()
    grad = torch.randn(9, 5)
    twin.zero_grad()
    twin(x).backward(grad)
    w = twin.weight.detach().double().requires_grad_()
    inputs = (x.detach().double().clamp(0, 1) * 15).round() / 15
    (w.tanh() / w.tanh().abs().max()).backward(grad.double().t() @ inputs)
    torch.testing.assert_close(twin.weight.grad.double(), w.grad, rtol=1e-4, atol=1e-5)
    assert x.grad is not None
    inside = (x.detach() >= 0) & (x.detach() <= 1)
    torch.testing.assert_close(x.grad, (grad @ twin.rounded_weight().detach()) * inside)


def test_pact_gradients_are_the_papers() -> None:
    model, _ = prepared(kdq.LowBit(weight_bits=3, act_bits=4, method="pact"), 5, 7)
    twin = model[0]
    twin.activation.alpha.data.fill_(0.8)
    x = (torch.randn(9, 7) * 2).requires_grad_()
    grad = torch.randn(9, 5)
    twin.zero_grad()
    twin(x).backward(grad)
    values = x.detach()
    through = grad @ twin.rounded_weight().detach()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, through * ((values > 0) & (values < 0.8)))
    torch.testing.assert_close(twin.activation.alpha.grad, through[values >= 0.8].sum())
    fake = (values.double().clamp(0, 0.8) / 0.8 * 15).round() * 0.8 / 15
    v = twin.weight.detach() / twin.weight_scale.detach()[:, None]
    q = v.round().clamp(-4, 3)
    slope = torch.where(v.round() == q, q - v, q).double()
    expected = ((grad.double().t() @ fake) * slope).sum(1) / (7 * 3) ** 0.5
    torch.testing.assert_close(twin.weight_scale.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_pact_starts_from_the_first_batch_and_its_penalty_shrinks_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    kdq.prepare_qat_(model, kdq.LowBit(weight_bits=4, act_bits=4, method="pact"))
    x = torch.randn(30, 4)
    with pytest.raises(RuntimeError, match="0: the activation scale is not initialized"):
        kdq.convert_(copy.deepcopy(model))
    model(x)
    alphas = [module.activation.alpha for module in model if isinstance(module, PACTQATLinear)]
    assert float(alphas[0].detach()) == float(x.max())
    penalty = kdq.pact_penalty(model)
    assert float(penalty.detach()) == pytest.approx(sum(float(a.detach()) ** 2 for a in alphas))
    penalty.backward()
    assert float(alphas[0].grad) == pytest.approx(2 * float(x.max()))
    with pytest.raises(ValueError, match="no PACT layer"):
        kdq.pact_penalty(nn.Sequential(nn.Linear(2, 2)))


@both
def test_twins_train_copy_and_compile(method: str) -> None:
    """Training lowers the loss of a regression far below that of the start, and the converted model keeps it."""
    torch.manual_seed(0)
    target, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), torch.rand(256, 8)
    y = target(x).detach()
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Hardtanh(0, 1), nn.Linear(32, 1), nn.BatchNorm1d(1))
    kdq.prepare_qat_(model, kdq.LowBit(weight_bits=4, act_bits=4, method=method))
    assert isinstance(model[0], PACTQATLinear if method == "pact" else DoReFaQATLinear)
    model(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    kdq.reestimate_batch_norm_(model, [x])
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        torch.compiler.reset()  # all models share the code of nn.Sequential, and its recompilations are counted
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        torch.compiler.reset()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        kdq.convert_(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@both
def test_bfloat16_agrees_too(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 33)).bfloat16()
    x = torch.rand(20, 70).bfloat16()
    kdq.prepare_qat_(model, kdq.LowBit(weight_bits=3, act_bits=4, method=method))
    with torch.no_grad():
        expected = model(x)
        kdq.convert_(model)
        got = model(x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected.float()).norm() / expected.float().norm() < 0.01


@both
def test_checkpoints_keep_the_method(method: str, tmp_path: Path) -> None:
    model, x = prepared(kdq.LowBit(weight_bits=3, act_bits=4, method=method))
    kdq.convert_(model)
    kdq.save(model, tmp_path / "m")
    loaded: Any = kdq.load(tmp_path / "m")
    assert torch.equal(loaded(x), model(x))
    assert loaded[0].config.method == method


@both
def test_a_weight_of_zeros_trains(method: str) -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    nn.init.zeros_(model[0].weight)
    kdq.prepare_qat_(model, kdq.LowBit(weight_bits=3, act_bits=4, method=method))
    x = torch.rand(5, 6)
    model(x).square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        expected = model(x)
        kdq.convert_(model)
        torch.testing.assert_close(model(x), expected)


def test_json_is_that_of_before_and_says_the_method() -> None:
    old = {"type": "LowBit", "weight_bits": 2, "act_bits": 4}
    assert config_from_json(old) == kdq.LowBit(weight_bits=2, act_bits=4, method="lsq")
    assert config_to_json(kdq.LowBit(weight_bits=2, act_bits=4)) == old
    for method in ("pact", "dorefa"):
        config = kdq.LowBit(weight_bits=2, act_bits=4, method=method)
        assert config_from_json(config_to_json(config)) == config


def test_what_the_methods_do_not_take() -> None:
    for bits, message in ((8, "2 to 7 bits.*got 8"), (1, "2 to 7 bits.*got 1")):
        with pytest.raises(ValueError, match=message):
            kdq.LowBit(weight_bits=bits, act_bits=4, method="dorefa")
    with pytest.raises(ValueError, match="act_bits"):
        kdq.LowBit(weight_bits=1, act_bits=1, method="pact")
    with pytest.raises(ValueError, match="method.*lsq, pact, dorefa"):
        kdq.LowBit(weight_bits=2, act_bits=2, method="wrpn")
    config = kdq.LowBit(weight_bits=2, act_bits=4, method="dorefa")
    for tool in (
        lambda m: kdq.quantize_(m, config, calibration=[torch.rand(4, 3)]),
        lambda m: kdq.reconstruct_(m, config, [torch.rand(4, 3)]),
    ):
        with pytest.raises(ValueError, match="'0'.*prepare_qat_"):
            tool(nn.Sequential(nn.Linear(3, 2)))
