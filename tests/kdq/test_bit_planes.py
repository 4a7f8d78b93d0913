"""Layers of few bits on bit planes: the same results to the last bit as on the int8 kernels, whichever runs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kdq
import kdq_kernels as kk
from kdq.grids import affine_grid
from kdq.layers import low_bit_linear
from kdq.layers.low_bit_linear import LEAST_SIDE, rows_for_planes

CONFIGS = [
    kdq.LowBit(weight_bits=1, act_bits=2),
    kdq.LowBit(weight_bits=1, act_bits=3),
    kdq.LowBit(weight_bits=1, act_bits=4, method="pact"),
    kdq.LowBit(weight_bits=2, act_bits=2),
    kdq.LowBit(weight_bits=2, act_bits=2, method="dorefa"),
]


def layer_of(config: kdq.LowBit, n: int = 70, k: int = 130, activation: str | None = None) -> kdq.LowBitLinear:
    torch.manual_seed(config.weight_bits + 10 * config.act_bits)
    grid = affine_grid(0.0 if config.method == "pact" else -0.8, 1.7, config.act_bits)
    return kdq.LowBitLinear.from_float(nn.Linear(k, n), config, input_grid=grid, activation=activation)


def on_int8(layer: kdq.LowBitLinear, x: Tensor) -> Tensor:
    """What the layer would give without planes."""
    return layer.int8_kernel(x, layer.packed_weight(), layer.activation)


def runs_on_planes(layer: kdq.LowBitLinear, x: Tensor) -> bool:
    """Whether the product of x is one of bit planes: seen by the operators that are called."""
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder(), torch.no_grad():
        layer(x)
    assert sum(name in ("kdq.bitplane_linear.default", "kdq.int8_linear.default") for name in called) == 1
    return "kdq.bitplane_linear.default" in called


@pytest.fixture
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have planes too, so that tests need no large ones."""
    monkeypatch.setattr(low_bit_linear, "LEAST_SIDE", 1)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@torch.no_grad()
def test_same_bits_on_either_kernel(
    isa: str, config: kdq.LowBit, activation: str | None, small_layers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are not faster, and in few rows."""
    monkeypatch.setattr(kk, "bitplane_pairs", lambda: 64)
    layer = layer_of(config, activation=activation)
    assert layer.planes is not None
    layer.plane_rows = 1
    for rows in (1, 5, 16, 31, 32, 100):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(rows, 130).to(dtype)
            x[rows // 2, 7], x[rows // 3, 9] = torch.nan, torch.inf
            assert runs_on_planes(layer, x)
            torch.testing.assert_close(layer(x), on_int8(layer, x), rtol=0, atol=0, equal_nan=True)


def test_which_layers_have_planes(isa: str) -> None:
    pairs = kk.bitplane_pairs()
    assert pairs == {"reference": 0, "avx512": 4}.get(isa, pairs)
    assert pairs in (0, 2, 4)
    by_bits = {(1, 2): 2, (1, 3): 3, (1, 4): 4, (2, 2): 4, (2, 3): 6, (3, 2): 6}
    for (weight_bits, act_bits), needed in by_bits.items():
        config = kdq.LowBit(weight_bits=weight_bits, act_bits=act_bits)
        assert (rows_for_planes(config, LEAST_SIDE, LEAST_SIDE) is not None) == (needed <= pairs)
        assert rows_for_planes(config, LEAST_SIDE - 1, LEAST_SIDE) is None
        assert rows_for_planes(config, LEAST_SIDE, LEAST_SIDE - 1) is None
    large = layer_of(CONFIGS[0], LEAST_SIDE, LEAST_SIDE)
    assert (large.planes is not None) == (large.weight_sum is not None) == (pairs >= 2)
    assert layer_of(CONFIGS[0]).planes is None


def test_many_rows_run_on_planes(small_layers: None) -> None:
    config = CONFIGS[0]
    layer, least = layer_of(config), rows_for_planes(config, 130, 70)
    if least is None:
        pytest.skip("no instruction set of this CPU is quicker with bit planes")
    assert runs_on_planes(layer, torch.randn(least, 130))
    assert runs_on_planes(layer, torch.randn(2, least // 2, 130))
    assert not runs_on_planes(layer, torch.randn(least - 1, 130))


def test_planes_follow_the_weight(small_layers: None) -> None:
    """Through copies, pickles, state dicts and a change of the instruction set."""
    config = CONFIGS[0]
    layer, x = layer_of(config), torch.randn(64, 130)
    with torch.no_grad():
        expected = layer(x)
        assert not any("planes" in name or "sum" in name for name in layer.state_dict())
        fresh = kdq.LowBitLinear(130, 70, config=config)
        assert not torch.equal(fresh(x), expected)
        fresh.load_state_dict(layer.state_dict())
        for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).bfloat16()):
            assert (other.planes is None) == (layer.planes is None)
            assert torch.equal(other(x), expected)
        pickled = layer.__getstate__()["_buffers"]
        assert pickled["planes"] is None
        assert pickled["weight_sum"] is None

        before = kk.cpu_isa()
        try:
            kk.set_isa("reference")
            assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
            assert layer.planes is None
            kk.set_isa(before)
            assert torch.equal(layer(x), expected)
        finally:
            kk.set_isa(before)


@torch.no_grad()
def test_compiles_and_exports(small_layers: None) -> None:
    layer = layer_of(CONFIGS[0])
    x = torch.randn(64, 130)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x[:3]), layer(x[:3]))  # another kernel, by a guard
    rows = torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: rows}})
    called = {str(node.target) for node in exported.graph.nodes}
    assert "kdq.int8_linear.default" in called
    for some in (x, x[:3]):
        assert torch.equal(exported.module()(some), layer(some))


def test_gradient_reaches_the_input(small_layers: None) -> None:
    layer = layer_of(CONFIGS[0])
    x = torch.randn(64, 130, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.dequantized_weight().sum(0).expand(64, 130))
