"""Training and inference agree: the integers exactly, the outputs to float rounding, for every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kdq
import kdq_kernels as kk
from kdq.configs import Config
from kdq.grids import int8_weight_scale, weight_range
from kdq.layers import BinaryLinear, BinaryQATLinear, Int8QATLinear, LowBitQATLinear

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
        scale, fake = twin.effective_weight_scale(), twin.fake_quantized_weight()
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
        assert torch.equal(twin.fake_quantize_input(x), q * scale[:, None])
        return q, scale[:, None]
    bits = 8 if isinstance(twin.config, kdq.Int8Static) else twin.config.act_bits
    q = kk.quantize(x, real.input_scale, real.input_zero_point, quant_min=0, quant_max=2**bits - 1)
    centred = q.long() - real.input_zero_point
    assert torch.equal(twin.input_grid(x), centred * real.input_scale)
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
    grad_w = twin.input_grid(x).detach().sum(0)
    torch.testing.assert_close(
        twin.weight_scale.grad, (grad_w * d_scale).sum(1) / (16 * 3) ** 0.5, rtol=1e-4, atol=1e-4
    )
    assert twin.input_grid.scale.grad is not None
    assert twin.input_grid.zero_point.grad is not None
