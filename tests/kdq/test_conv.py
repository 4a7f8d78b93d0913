"""Convolutions on the kernels: training and inference agree, gradients are those of the rounded layer, and an inference
layer keeps what it is."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
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
from conv_cases import CONFIGS, FOUR, METHODS, X, conv, in_format, net, prepared, quantized
from kdq.configs import Config
from kdq.grids import AffineGrid, int8_weight_scale, weight_range
from kdq.layers import (
    BinaryConv2d,
    BinaryQATConv2d,
    DoReFaQATConv2d,
    Int8Conv2d,
    Int8QATConv2d,
    LowBitConv2d,
    LowBitQATConv2d,
    PACTQATConv2d,
)
from kdq.layers.qat_product import fake_input, fake_weight, gradient_factor
from small_models import randn


@pytest.fixture(scope="module", autouse=True)
def without_onednn() -> Iterator[None]:
    """torch's float32 convolutions by oneDNN read beyond their operands at some sizes (channels_last, 4 x 1 images,
    3 x 2 kernels, stride 2): now and then that ends the process."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


every_config = pytest.mark.parametrize("config", CONFIGS, ids=str)
KINDS: dict[type[Config], type[nn.Module]] = {
    kdq.Int8Dynamic: Int8Conv2d,
    kdq.Int8Static: Int8Conv2d,
    kdq.LowBit: LowBitConv2d,
    kdq.Binary: BinaryConv2d,
}


# ---- training and inference ------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Conv2d, Tensor]:
    """A convolution, and images that it takes."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel, dilation, padding = pair(1, 3), pair(1, 2), pair(0, 3)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    height, width = (draw(st.integers(size, size + 6)) for size in least)
    channels = draw(st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 65])))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layer = nn.Conv2d(
        channels, draw(st.integers(1, 20)), kernel, pair(1, 3), padding, dilation, bias=draw(st.booleans())
    )
    x = torch.randn(draw(st.integers(1, 4)), channels, height, width) * 3 + 0.5
    return layer, in_format(x, draw(st.booleans()))


configs = st.one_of(
    st.sampled_from([kdq.Int8Dynamic(), kdq.Int8Static(), kdq.Binary(), *METHODS]),
    st.builds(lambda w, a: kdq.LowBit(weight_bits=w, act_bits=a), st.integers(1, 8), st.integers(2, 8)),
)


@pytest.mark.filterwarnings("ignore:.*a first batch without a negative value")
@settings(max_examples=100, deadline=None)
@given(config=configs, case=cases())
def test_integers_are_equal_and_outputs_agree(config: Config, case: tuple[nn.Conv2d, Tensor]) -> None:
    layer, x = case
    shape = layer.weight.shape
    model = nn.Sequential(layer)
    kdq.prepare_qat_(model, config)
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):  # so that learned scales and zero points are no round numbers
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    twin: Any = model[0]
    with torch.no_grad():
        expected = model(x)
        kdq.convert_(model)
        real: Any = model[0]
        got = model(x)
        weight = weight_integers(twin, real)
        inputs, scale = input_integers(real, x)
    assert type(real) is KINDS[type(config)]
    size = float(expected.abs().max()) + 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * size)
    exact = F.conv2d(inputs.double(), weight.double().view(shape), None, layer.stride, layer.padding, layer.dilation)
    exact = exact * scale.double() * real.weight_scale.double()[:, None, None]
    exact = exact if real.bias is None else exact + real.bias.double()[:, None, None]
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6 * size)


def weight_integers(twin: Any, real: Any) -> Tensor:
    """`[N, K]` of the inference layer, which are those of the twin's rounded weight."""
    rows = twin.weight.detach().flatten(1)
    if isinstance(twin, BinaryQATConv2d):
        expected = torch.where(rows < 0, -1, 1)
        assert torch.equal(real.signs(), expected.float())
        return expected
    if isinstance(twin, DoReFaQATConv2d | PACTQATConv2d):
        fake = twin.rounded_weight()
    elif isinstance(twin, LowBitQATConv2d):
        fake = fake_weight(rows, None if twin.weight_scale is None else real.weight_scale, twin.config.weight_bits)
    else:
        assert isinstance(twin, Int8QATConv2d)
        assert torch.equal(real.weight_scale, int8_weight_scale(rows))
        fake = fake_weight(rows, None, 8)
    torch.testing.assert_close(fake, kk.dequantize(real.int8_weight(), real.weight_scale, axis=0), rtol=1e-6, atol=0)
    packed = kk.unpack_int8_weight(real.packed)
    assert torch.equal(packed, real.int8_weight().view(real.geometry.weight_shape).permute(0, 2, 3, 1).flatten(1))
    return real.int8_weight().long()


def input_integers(real: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The activations' integers, less the zero point, and their scale."""
    if isinstance(real, BinaryConv2d):
        return torch.where(x < 0, -1, 1), torch.tensor(1.0)
    if real.input_scale is None:
        q, scale = kk.quantize_rows(x.flatten(1))
        return q.view(x.shape), scale[:, None, None, None]
    q = kk.quantize(x, real.input_scale, real.input_zero_point, quant_min=0, quant_max=real.input_quant_max)
    return q.long() - real.input_zero_point, real.input_scale


@pytest.mark.parametrize("config", CONFIGS + METHODS, ids=str)
def test_a_twin_turned_to_bfloat16_trains_on_and_agrees(config: Config) -> None:
    model = nn.Sequential(prepared(config))
    model.bfloat16()
    x = X.bfloat16()
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        expected = model(x)
        kdq.convert_(model)
        got = model(x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected.float()).norm() / expected.float().norm() < 0.01


# ---- gradients -------------------------------------------------------------------------------------------------------


def composed(twin: Any, x: Tensor) -> Tensor:
    """What a twin computes, from differentiable operators one by one."""

    def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
        return value + (rounded - value).detach()

    rows = twin.weight.flatten(1)
    bits = getattr(twin.config, "weight_bits", 8)
    if isinstance(twin, BinaryQATConv2d) or bits == 1:
        signs, mean = kk.binarize_rows(rows)
        weight = signs * mean[:, None]
    elif isinstance(twin, Int8QATConv2d):
        weight = straight_through(rows, fake_weight(rows, None, 8))
    else:
        low, high = weight_range(bits)
        weight = kk.fake_quantize(rows, twin.weight_scale, quant_min=low, quant_max=high, axis=0)
    if isinstance(twin, BinaryQATConv2d):
        rounded = kk.binarize_rows(x)[0]
    elif twin.input_grid is None:
        rounded = straight_through(x, fake_input(x.flatten(1), None, None, 8).view(x.shape))
    else:
        grid = twin.input_grid
        rounded = kk.fake_quantize(x, grid.scale, grid.zero_point, quant_min=0, quant_max=2**grid.bits - 1)
    return F.conv2d(rounded, weight.view(twin.weight.shape), twin.bias, twin.stride, twin.padding, twin.dilation)


@every_config
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("frozen", ["", "x", "weight", "weight and scales"])
def test_gradients_are_those_of_the_composition(config: Config, last: bool, frozen: str) -> None:
    """Up to LSQ's factor on the gradients of scales and zero points: of the activations', the features of an image."""
    twin = prepared(config)
    x = in_format(X.clone(), last).requires_grad_(frozen != "x")
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(
            not ("weight" in frozen and name == "weight") and not ("scale" in frozen and "scale" in name)
        )
    results = []
    for function in (twin, lambda value: composed(twin, value)):
        y = function(x)
        wanted = {n: p for n, p in [("x", x), *twin.named_parameters()] if p.requires_grad}
        grad = in_format(randn(*y.shape, seed=1), last)
        results.append(dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad), strict=True)))
    act_max = 2 ** getattr(config, "act_bits", 8) - 1
    factors = {
        "weight_scale": gradient_factor(5 * 3 * 2, weight_range(getattr(config, "weight_bits", 8))[1]),
        "input_grid.scale": gradient_factor(5 * 9 * 8, act_max),
        "input_grid.zero_point": gradient_factor(5 * 9 * 8, act_max),
    }
    assert results[1]
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value * factors.get(name, 1.0), rtol=1e-4, atol=1e-4)


@every_config
def test_a_twin_trains_in_every_setting(config: Config) -> None:
    """Checkpointing, a copy, one image at a time and compiling give the gradients of the plain call."""
    twin = prepared(config)

    def gradients(run: Any, of: nn.Module = twin) -> list[Tensor]:
        of.zero_grad()
        run()
        return [p.grad.clone() for p in of.parameters() if p.grad is not None]

    plain = gradients(lambda: twin(X).square().sum().backward())
    copied = copy.deepcopy(twin)
    runs = [
        gradients(lambda: checkpoint(twin, X, use_reentrant=False).square().sum().backward()),
        gradients(lambda: copied(X).square().sum().backward(), copied),
        gradients(lambda: sum(twin(image).square().sum() for image in X).backward()),
    ]
    if config in (FOUR, kdq.Binary()):
        torch.compiler.reset()
        compiled = torch.compile(twin, fullgraph=True)
        runs.append(gradients(lambda: compiled(X).square().sum().backward()))
        torch.compiler.reset()
    for got in runs:
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        y = twin(X)
    assert y.dtype == torch.bfloat16
    half = gradients(lambda: y.square().sum().backward())
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in half)
    assert twin(X[:0]).shape == (0, 7, 9, 3)


@every_config
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_gradient_passes_a_frozen_layer_to_the_input(config: Config, last: bool) -> None:
    layer = quantized(config)
    x = in_format(X.clone(), last).requires_grad_()
    y = layer(x)
    assert torch.equal(y.detach(), layer(X))
    grad = randn(*y.shape, seed=2)
    y.backward(grad)
    float_layer = layer.to_float()
    other = X.clone().requires_grad_()
    float_layer(other).backward(grad)
    torch.testing.assert_close(x.grad, other.grad)


def test_a_convnet_learns() -> None:
    teacher, student = net().eval(), net(seed=1)
    kdq.prepare_qat_(student, FOUR)
    batches = [randn(16, 5, 8, 8, seed=s) for s in range(4)]
    history = kdq.Distiller(teacher, student, [kdq.SoftTargets(T=2)]).fit(batches, 12, lr=1e-2, progress=False)
    assert history.losses[-1] < 0.7 * history.losses[0]
    kdq.convert_(student.eval())
    assert not [m for m in student.modules() if isinstance(m, nn.Conv2d)]


# ---- the inference layers --------------------------------------------------------------------------------------------


@every_config
def test_copies_state_and_isa(config: Config) -> None:
    layer = quantized(config)
    expected = layer(X)
    assert torch.equal(copy.deepcopy(layer)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(X), expected)
    assert "packed" not in layer.state_dict()
    other = quantized(config, conv(seed=1))
    assert not torch.equal(other(X), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(X), expected)
    assert layer.bfloat16().weight_scale.dtype == torch.float32
    before = kk.cpu_isa()
    try:
        kk.set_isa("reference")
        torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)
    finally:
        kk.set_isa(before)
    torch.testing.assert_close(layer(X), expected, rtol=0, atol=0)


@every_config
def test_to_float_and_back(config: Config) -> None:
    layer = quantized(config)
    plain = layer.to_float()
    assert type(plain) is nn.Conv2d
    assert (plain.kernel_size, plain.stride, plain.padding, plain.dilation) == ((3, 2), (1, 2), (1, 0), (1, 2))
    assert torch.equal(plain.weight, layer.dequantized_weight())
    grid = {}
    if getattr(layer, "input_scale", None) is not None:
        grid = {"input_grid": AffineGrid(layer.input_scale, layer.input_zero_point)}
    again = type(layer).from_float(plain, config, **grid)
    assert (again.dequantized_weight() - plain.weight).norm() / plain.weight.norm() < 1e-3


@pytest.mark.parametrize("config", [kdq.Int8Dynamic(), kdq.Int8Static(), FOUR], ids=str)
def test_near_the_float_layer(config: Config) -> None:
    expected = conv()(X)
    error = (quantized(config)(X) - expected).norm() / expected.norm()
    assert error < (0.2 if config == FOUR else 0.02)


@every_config
def test_shapes_formats_and_dtypes(config: Config) -> None:
    layer = quantized(config)
    y = layer(X)
    assert y.is_contiguous()
    last = layer(in_format(X, True))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, y)
    assert torch.equal(layer(X[0]), y[:1].squeeze(0))
    assert torch.equal(layer(X.transpose(2, 3).contiguous().transpose(2, 3)), y)
    assert layer(X.half()).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(X), layer(X.bfloat16()))


@every_config
def test_wrong_inputs_are_named(config: Config) -> None:
    for layer in (quantized(config), prepared(config)):
        for x in (X[:, :4], X[0, :4], X[0, 0], X[None]):
            with pytest.raises(ValueError, match=re.escape(f"[5, height, width], got {list(x.shape)}")):
                layer(x)


@pytest.mark.parametrize("config", [kdq.Int8Dynamic(), FOUR, kdq.Binary()], ids=str)
def test_compiles_and_exports(config: Config) -> None:
    layer = quantized(config)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(compiled(X), layer(X), rtol=1e-5, atol=1e-5)
        exported = torch.export.export(layer, (X,))
    assert sum(str(node.target).startswith("kdq.") for node in exported.graph.nodes) == 1
    torch.testing.assert_close(exported.module()(X), layer(X), rtol=1e-5, atol=1e-5)


def test_constructors_check_their_arguments() -> None:
    layer = Int8Conv2d(3, 4, 3, config=kdq.Int8Dynamic())
    assert (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 3), (1, 1), (0, 0), (1, 1))
    assert "3, 4, kernel_size=(3, 3), bias=True" in repr(layer)
    for name, value in (("kernel_size", 0), ("stride", (1, 0)), ("padding", -1), ("dilation", 1.5), ("stride", "1")):
        arguments = {"kernel_size": 3, name: value}
        with pytest.raises(ValueError, match=f"{name}: expected an integer of at least"):
            LowBitConv2d(3, 4, **arguments, config=FOUR)
    with pytest.raises(ValueError, match="config: Int8WeightOnly has no convolution kernels"):
        Int8Conv2d(3, 4, 3, config=kdq.Int8WeightOnly())
    with pytest.raises(ValueError, match="config: Int8WeightOnly has no convolution kernels"):
        Int8QATConv2d(nn.Conv2d(3, 4, 3), kdq.Int8WeightOnly())
    with pytest.raises(ValueError, match="activation: the binary kernels compute none"):
        BinaryConv2d(3, 4, 3, config=kdq.Binary(), activation="relu")
    with pytest.raises(ValueError, match="layer: it has 3 groups"):
        BinaryConv2d.from_float(nn.Conv2d(3, 3, 3, groups=3))
    with pytest.raises(ValueError, match="input_grid: Int8Static"):
        Int8Conv2d.from_float(conv(), kdq.Int8Static())


def test_padding_of_a_binary_convolution_contributes_nothing() -> None:
    layer = nn.Conv2d(5, 2, 3, padding=2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(-0.5)
    y = quantized(kdq.Binary(), layer, X)(torch.ones(1, 5, 4, 4))
    assert float(y[0, 0, 0, 0]) == -0.5 * 5
    assert float(y[0, 0, 2, 2]) == -0.5 * 5 * 9
