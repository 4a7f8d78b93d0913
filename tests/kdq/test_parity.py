"""Training and inference agree: the integers exactly, the outputs to float rounding, for every layer."""

from __future__ import annotations

import copy
from dataclasses import astuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kdq
import kdq_kernels as kk
from kdq.configs import Config
from kdq.grids import int8_weight_scale, weight_range
from kdq.layers import BinaryLinear, BinaryQATLinear, Int8QATLinear, LowBitQATLinear
from kdq.layers.qat_product import fake_input, fake_weight, gradient_factor

configs = st.one_of(
    st.sampled_from([kdq.Int8Dynamic(), kdq.Int8Static(), kdq.Int8WeightOnly(), kdq.Binary()]),
    st.builds(lambda w, a: kdq.LowBit(weight_bits=w, act_bits=a), st.integers(1, 8), st.integers(2, 8)),
)


def trained(config: Config, n: int, k: int, bias: bool, seed: int) -> tuple[nn.Sequential, Tensor]:
    """A training twin after a few steps, so that learned scales and zero points are no round numbers."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(k, n, bias=bias))
    x = torch.randn(23, k) * 3 + 0.5
    kdq.prepare_qat_(model, config)
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval(), x


@settings(max_examples=120, deadline=None)
@given(
    config=configs,
    n=st.integers(1, 40),
    k=st.integers(1, 130),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_integers_are_equal_and_outputs_agree(config: Config, n: int, k: int, bias: bool, seed: int) -> None:
    model, x = trained(config, n, k, bias, seed)
    twin: Any = model[0]
    with torch.no_grad():
        expected = model(x)
        weight = twin_weight_integers(twin)
        kdq.convert_(model)
        real: Any = model[0]
        assert torch.equal(real_weight_integers(real), weight)
        inputs, scale = input_integers(twin, real, x)
        got = model(x)
    size = float(expected.abs().max()) + 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * size)
    if inputs is not None:
        exact = inputs.double() @ weight.double().t() * scale.double() * real.weight_scale.double()
        exact = exact if real.bias is None else exact + real.bias.double()
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6 * size)


def twin_weight_integers(twin: Any) -> Tensor:
    """What the training twin's fake-quantized weight is in units of its scale."""
    if isinstance(twin, BinaryQATLinear):
        return torch.where(twin.weight < 0, -1, 1)
    if isinstance(twin, Int8QATLinear):
        scale, limits = int8_weight_scale(twin.weight), (-127, 127)
        fake = kk.fake_quantize(twin.weight, scale, quant_min=limits[0], quant_max=limits[1], axis=0)
    else:
        assert isinstance(twin, LowBitQATLinear)
        scale = twin.effective_weight_scale()
        fake = fake_weight(twin.weight, None if twin.weight_scale is None else scale, twin.config.weight_bits)
        limits = (-1, 1) if twin.config.weight_bits == 1 else weight_range(twin.config.weight_bits)
    integers = (fake.double() / scale.double()[:, None]).round()
    assert integers.min() >= limits[0]
    assert integers.max() <= limits[1]
    return integers.long()


def real_weight_integers(real: Any) -> Tensor:
    if isinstance(real, BinaryLinear):
        return kk.unpack_signs(real.weight_bits, real.in_features).long()
    assert torch.equal(kk.unpack_int8_weight(real.packed), real.int8_weight())
    return real.int8_weight().long()


def input_integers(twin: Any, real: Any, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """The activations' integers (less the zero point) by which both layers must compute, and their scale."""
    if isinstance(twin, BinaryQATLinear):
        return torch.where(x < 0, -1, 1), torch.tensor(1.0)
    if isinstance(twin.config, kdq.Int8WeightOnly):
        return None, torch.tensor(1.0)
    if isinstance(twin.config, kdq.Int8Dynamic):
        q, scale = kk.quantize_rows(x)
        assert torch.equal(fake_input(x, None, None, 8), q * scale[:, None])
        return q, scale[:, None]
    bits = 8 if isinstance(twin.config, kdq.Int8Static) else twin.config.act_bits
    q = kk.quantize(x, real.input_scale, real.input_zero_point, quant_min=0, quant_max=2**bits - 1)
    centred = q.long() - real.input_zero_point
    assert torch.equal(fake_input(x, real.input_scale, real.input_zero_point, bits), centred * real.input_scale)
    return centred, real.input_scale


@pytest.mark.parametrize(
    "config",
    [kdq.Int8Dynamic(), kdq.Int8Static(), kdq.LowBit(weight_bits=3, act_bits=4), kdq.Binary()],
    ids=str,
)
def test_bfloat16_agrees_too(config: Config) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 33)).bfloat16()
    x = torch.randn(20, 70).bfloat16()
    kdq.prepare_qat_(model, config)
    with torch.no_grad():
        expected = model(x)
        kdq.convert_(model)
        got = model(x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected.float()).norm() / expected.float().norm() < 0.01


@pytest.mark.parametrize(
    "config",
    [
        kdq.Int8Dynamic(),
        kdq.Int8Static(),
        kdq.Int8WeightOnly(),
        kdq.Codebook(weight_bits=4),
        kdq.LowBit(weight_bits=3, act_bits=4),
        kdq.LowBit(weight_bits=3, act_bits=4, method="pact"),
        kdq.LowBit(weight_bits=3, act_bits=4, method="dorefa"),
        kdq.Binary(),
    ],
    ids=str,
)
def test_a_twin_turned_to_bfloat16_trains_on_and_agrees(config: Config) -> None:
    """Its learned scales stay float32, as they are in inference."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(70, 33))
    x = torch.rand(20, 70)
    kdq.prepare_qat_(model, config)
    model(x).sum().backward()
    before = {name: p.detach().clone() for name, p in model[0].named_parameters()}
    model.bfloat16()
    for name, p in model[0].named_parameters():
        weight = name in ("weight", "bias")
        assert p.dtype == p.grad.dtype == (torch.bfloat16 if weight else torch.float32)
        assert weight or torch.equal(p, before[name])
    x = x.bfloat16()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        expected = model(x)
        kdq.convert_(model)
        got = model(x)
    assert (got.float() - expected.float()).norm() / expected.float().norm() < 0.01


def test_binary_gradient_has_both_terms_of_the_paper() -> None:
    """XNOR-Net: through sign(w), where |w| <= 1, and through the mean magnitude."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 2, bias=False))
    kdq.prepare_qat_(model, kdq.Binary())
    twin: Any = model[0]
    twin.weight.data[0, 0] = 1.5
    x, grad = torch.randn(7, 5), torch.randn(7, 2)
    model(x).backward(grad)
    sign_x, w = torch.where(x < 0, -1.0, 1.0), twin.weight.detach()
    sign_w, alpha = torch.where(w < 0, -1.0, 1.0), w.abs().mean(1, keepdim=True)
    product = grad.t() @ sign_x
    expected = alpha * product * (w.abs() <= 1) + (product * sign_w).sum(1, keepdim=True) / 5 * w.sign()
    torch.testing.assert_close(twin.weight.grad, expected)


def test_learned_scales_get_lsq_gradients() -> None:
    """The gradient of a weight scale is LSQ's, times 1 / sqrt(elements * quant_max)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4))
    kdq.prepare_qat_(model, kdq.LowBit(weight_bits=3, act_bits=4))
    twin: Any = model[0]
    x = torch.randn(9, 16)
    model(x).sum().backward()
    v = twin.weight.detach() / twin.weight_scale.detach()[:, None]
    q = v.round().clamp(-4, 3)
    d_scale = torch.where(v.round() == q, q - v, q)
    grad_w = fake_input(x, *astuple(twin.input_grid.grid()), 4).detach().sum(0)
    torch.testing.assert_close(
        twin.weight_scale.grad, (grad_w * d_scale).sum(1) / (16 * 3) ** 0.5, rtol=1e-4, atol=1e-4
    )
    assert twin.input_grid.scale.grad is not None
    assert twin.input_grid.zero_point.grad is not None


qat_configs = pytest.mark.parametrize(
    "config",
    [
        kdq.Int8Dynamic(),
        kdq.Int8Static(),
        kdq.LowBit(weight_bits=4, act_bits=4),
        kdq.LowBit(weight_bits=1, act_bits=4),
        kdq.Binary(),
    ],
    ids=str,
)


def composed(twin: Any, x: Tensor) -> Tensor:
    """What a twin computes, from differentiable operators one by one."""

    def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
        return value + (rounded - value).detach()

    if isinstance(twin, BinaryQATLinear) or twin.weight_scale_bits == 1:
        signs, mean = kk.binarize_rows(twin.weight)
        weight = signs * mean[:, None]
    elif isinstance(twin, Int8QATLinear):
        weight = straight_through(twin.weight, fake_weight(twin.weight, None, 8))
    else:
        low, high = weight_range(twin.config.weight_bits)
        weight = kk.fake_quantize(twin.weight, twin.weight_scale, quant_min=low, quant_max=high, axis=0)
    if isinstance(twin, BinaryQATLinear):
        rounded = kk.binarize_rows(x)[0]
    elif twin.input_grid is None:
        rounded = straight_through(x, fake_input(x, None, None, 8))
    else:
        grid = twin.input_grid
        rounded = kk.fake_quantize(x, grid.scale, grid.zero_point, quant_min=0, quant_max=2**grid.bits - 1)
    return F.linear(rounded, weight, twin.bias)


@qat_configs
@pytest.mark.parametrize("frozen", ["", "x", "weight", "weight and scales"])
def test_gradients_are_those_of_the_composition(config: Config, frozen: str) -> None:
    """Up to LSQ's factor on the gradients of scales and zero points."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(48, 20))
    kdq.prepare_qat_(model, config)
    twin: Any = model[0]
    twin.weight_scale_bits = getattr(config, "weight_bits", 8)
    x, grad = torch.randn(3, 11, 48) * 2, torch.randn(3, 11, 20)
    model(x)
    x.requires_grad_(frozen != "x")
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(
            not ("weight" in frozen and name == "weight") and not ("scale" in frozen and "scale" in name)
        )
    results = []
    for function in (twin, lambda value: composed(twin, value)):
        y = function(x)
        wanted = {n: p for n, p in [("x", x), *twin.named_parameters()] if p.requires_grad}
        results.append(dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad), strict=True)))
    factors = {
        "weight_scale": gradient_factor(48, weight_range(getattr(config, "weight_bits", 8))[1]),
        "input_grid.scale": gradient_factor(48, 2 ** getattr(config, "act_bits", 8) - 1),
        "input_grid.zero_point": gradient_factor(48, 2 ** getattr(config, "act_bits", 8) - 1),
    }
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value * factors.get(name, 1.0), rtol=1e-4, atol=1e-4)


@qat_configs
def test_a_twin_trains_in_every_setting(config: Config) -> None:
    """Two forwards before the backwards, checkpointing, compiling and a copy give the gradients of the plain call."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(40, 12))
    kdq.prepare_qat_(model, config)
    x, other = torch.randn(6, 40), torch.randn(6, 40)
    model(x)

    def gradients(run: Any, of: nn.Module = model) -> list[Tensor]:
        of.zero_grad()
        run()
        return [p.grad.clone() for p in of.parameters() if p.grad is not None]

    plain = gradients(lambda: model(x).square().sum().backward())

    def two_forwards() -> None:
        first, second = model(x).square().sum(), model(other).square().sum()
        first.backward()
        assert torch.isfinite(second)

    copied = copy.deepcopy(model)
    torch.compiler.reset()  # all models here share the code of nn.Sequential, and its recompilations are counted
    compiled = torch.compile(model, fullgraph=True)
    settings_ = [
        gradients(two_forwards),
        gradients(lambda: checkpoint(model, x, use_reentrant=False).square().sum().backward()),
        gradients(lambda: compiled(x).square().sum().backward()),
        gradients(lambda: copied(x).square().sum().backward(), copied),
    ]
    for got in settings_:
        torch.testing.assert_close(got, plain)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    half = gradients(lambda: y.square().sum().backward())
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in half)
    assert model(x[:0]).shape == (0, 12)
    model(x[0]).sum().backward()
    torch.compiler.reset()


@pytest.mark.parametrize(
    "config",
    [kdq.Int8Dynamic(), kdq.LowBit(weight_bits=1, act_bits=4), kdq.LowBit(weight_bits=3, act_bits=4), kdq.Binary()],
    ids=str,
)
def test_a_channel_of_zeros_trains_and_agrees(config: Config) -> None:
    """As in a branch that starts at zero, or after pruning."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 5))
    with torch.no_grad():
        model[0].weight[2] = 0
    kdq.prepare_qat_(model, config)
    x = torch.randn(7, 20)
    model(x).square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    model.eval()
    with torch.no_grad():
        expected = model(x)
        kdq.convert_(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
