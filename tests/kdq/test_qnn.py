"""Parts of training from scratch, each against its paper's formula in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq.qnn import QuantizeGradient, ShiftAdaMax, ShiftBatchNorm1d, clip_weights_, power_of_two
from small_models import randn


def ap2(x: Tensor) -> Tensor:
    """By the logarithm, in float64."""
    powers = torch.sign(x.double()) * 2.0 ** torch.round(torch.log2(x.double().abs()))
    return torch.where(x == 0, 0.0, powers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_power_of_two(dtype: torch.dtype) -> None:
    x = (randn(1000) * 10.0 ** (randn(1000, seed=1) * 3)).to(dtype)
    root = 2 * torch.tensor(0.5).sqrt()  # rounded, on the lower side of the tie
    x[:7] = torch.tensor([0.0, -0.0, 1.0, -4.0, 2**-20, 1.41, root])
    x.requires_grad_()
    y = power_of_two(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), ap2(x.detach()), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad == 1).all()
    special = power_of_two(torch.tensor([math.inf, -math.inf, math.nan, 1e-45]))
    torch.testing.assert_close(special, torch.tensor([math.inf, -math.inf, math.nan, 1e-45]), equal_nan=True)


# ---- shift-based batch norm ------------------------------------------------------------------------------------------


def test_shift_batch_norm() -> None:
    x = randn(40, 7) * 3 + randn(7, seed=1)
    norm = ShiftBatchNorm1d(7, momentum=0.25)
    with torch.no_grad():
        norm.weight.copy_(randn(7, seed=2))
        norm.bias.copy_(randn(7, seed=3))
    got = norm(x)
    mean = x.double().mean(0)
    centred = x.double() - mean
    variance = (centred * ap2(centred)).mean(0)
    expected = centred * ap2((variance + norm.eps).rsqrt()) * ap2(norm.weight.detach()) + norm.bias.detach().double()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_mean.double(), 0.25 * mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), 0.75 + 0.25 * variance, rtol=1e-5, atol=1e-6)
    norm.eval()
    row = norm(x[:1])
    shift = ap2((norm.running_var + norm.eps).rsqrt()) * ap2(norm.weight.detach())
    want = (x[:1].double() - norm.running_mean) * shift + norm.bias.detach()
    torch.testing.assert_close(row.double(), want, rtol=1e-5, atol=1e-5)


def test_shift_batch_norm_is_close_to_batch_norm_and_so_is_its_gradient() -> None:
    """Each factor is off by sqrt(2) at most; only gamma's and the deviation's are seen."""
    x = randn(200, 5).requires_grad_()
    upstream = randn(200, 5, seed=1)
    grads = []
    for norm in (nn.BatchNorm1d(5), ShiftBatchNorm1d(5)):
        y = norm(x)
        (grad,) = torch.autograd.grad((y * upstream).sum(), x)
        grads.append((y.detach(), grad))
    for exact, shifted in zip(*grads, strict=True):
        ratio = (exact * shifted).sum(0) / exact.square().sum(0)
        assert (ratio > 0.6).all()
        assert (ratio < 1.6).all()
        assert (torch.cosine_similarity(exact, shifted, dim=0) > 0.95).all()


def test_shift_batch_norm_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"x: expected \[batch, 5\], got \[2, 5, 5\]"):
        ShiftBatchNorm1d(5)(torch.ones(2, 5, 5))
    with pytest.raises(ValueError, match="more than one row"):
        ShiftBatchNorm1d(5)(torch.ones(1, 5))


# ---- shift-based AdaMax ----------------------------------------------------------------------------------------------


def test_shift_adamax() -> None:
    start, lr, b1, b2 = randn(30), 3e-3, 1 - 2**-3, 1 - 2**-10
    parameter = nn.Parameter(start.clone())
    optimizer = ShiftAdaMax([parameter], lr=lr)
    p, m, v = start.double(), torch.zeros(30).double(), torch.zeros(30).double()
    for t in range(1, 8):
        grad = randn(30, seed=t) * 10.0**-t
        grad[0] = 0  # a parameter without a gradient stays
        parameter.grad = grad.clone()
        optimizer.step()
        m = b1 * m + (1 - b1) * grad.double()
        v = torch.maximum(b2 * v, grad.double().abs())
        p = p - ap2(torch.tensor(lr / (1 - b1**t))) * m * torch.where(v > 0, ap2(1 / v), 0.0)
        torch.testing.assert_close(parameter.detach().double(), p, rtol=1e-5, atol=1e-6)
    assert parameter[0] == start[0]


def test_shift_adamax_goes_on_from_its_state() -> None:
    parameters = [nn.Parameter(randn(4)), nn.Parameter(randn(4))]
    first, second = (ShiftAdaMax([p]) for p in parameters)
    for step in range(4):
        if step == 2:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            parameters[1].data.copy_(parameters[0].data)
        for parameter, optimizer in zip(parameters, (first, second), strict=True):
            parameter.grad = randn(4, seed=step)
            optimizer.step()
    assert torch.equal(parameters[0], parameters[1])


@pytest.mark.parametrize(("arguments", "name"), [({"lr": -1.0}, "lr"), ({"betas": (0.5, 1.0)}, "betas")])
def test_shift_adamax_refuses(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        ShiftAdaMax([nn.Parameter(randn(2))], **arguments)


# ---- quantized gradients ---------------------------------------------------------------------------------------------


def gradient(upstream: Tensor, bits: int, method: str) -> Tensor:
    x = torch.zeros_like(upstream, requires_grad=True)
    (grad,) = torch.autograd.grad(QuantizeGradient(bits, method)(x), x, upstream)
    return grad


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_stochastic_gradients(bits: int) -> None:
    """On DoReFa's levels, next to the value, and right in the mean."""
    torch.manual_seed(0)
    upstream = randn(5, 4, 3) * torch.tensor([1e-6, 1.0, 100.0, 1e3, 0.0]).view(5, 1, 1)
    largest = upstream.abs().amax((1, 2), keepdim=True)
    step = 2 * largest / (2**bits - 1)
    total = torch.zeros_like(upstream)
    draws = 400
    for _ in range(draws):
        got = gradient(upstream, bits, "stochastic")
        assert ((got - upstream).abs() <= step * 1.001).all()
        levels = (got[:4] / largest[:4] + 1) / 2 * (2**bits - 1)
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
        assert (got[4] == 0).all()
        total += got
    assert ((total / draws - upstream).abs() <= 5 * step / (2 * math.sqrt(draws)) + 1e-12).all()


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_logarithmic_gradients(bits: int) -> None:
    upstream = randn(50, 8) * 10.0 ** (randn(50, 8, seed=1) * 2)
    upstream[0] = 0
    powers = ap2(upstream)
    smallest = powers.abs().max() * 2.0 ** -(2 ** (bits - 1) - 2)
    expected = torch.where(powers.abs() < smallest, 0.0, powers)
    got = gradient(upstream, bits, "log")
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=0)
    assert len(got.abs().unique()) <= 2 ** (bits - 1)
    assert (gradient(torch.zeros(3, 2), bits, "log") == 0).all()


def test_quantize_gradient_refuses() -> None:
    with pytest.raises(ValueError, match="bits: expected an integer from 2 to 8, got 1"):
        QuantizeGradient(1)
    with pytest.raises(ValueError, match="method: expected one of stochastic, log"):
        QuantizeGradient(4, "linear")


# ---- all together ----------------------------------------------------------------------------------------------------


def test_clip_weights() -> None:
    """Of binary twins alone."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    for layer in model:
        nn.init.constant_(layer.weight, -1.5)
    kdq.prepare_qat_(model, {"0": kdq.Binary(), "1": kdq.Int8Dynamic()})
    clip_weights_(model)
    assert [float(layer.weight.detach().max()) for layer in model] == [-1.0, -1.5, -1.5]


def test_binary_net_trained_from_scratch_folds_to_bits(tmp_path) -> None:
    """Every part in one net: it learns, and the folded chain gives what it gave."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 65),
        QuantizeGradient(6),
        ShiftBatchNorm1d(65),
        nn.Hardtanh(),
        nn.Linear(65, 33),
        QuantizeGradient(6, "log"),
        ShiftBatchNorm1d(33),
        nn.Hardtanh(),
        nn.Linear(33, 2),
        nn.BatchNorm1d(2),
    )
    kdq.prepare_qat_(model, kdq.Binary())
    optimizer = ShiftAdaMax(model.parameters(), lr=2**-6)
    x = randn(256, 16)
    y = (x[:, 0] > 0).long()
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clip_weights_(model)
    kdq.convert_(model.eval())
    with torch.inference_mode():
        expected = model(x)
        assert (expected.argmax(1) == y).float().mean() > 0.9
        report = kdq.fold_binary_chain_(model)
        assert report.left == {"8": "no binary layer follows it"}
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        kdq.save(model, tmp_path / "model.safetensors")
        torch.testing.assert_close(kdq.load(tmp_path / "model.safetensors")(x), expected, rtol=0, atol=0)
