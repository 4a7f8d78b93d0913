"""chain_layers_: neighbouring layers as one operator, with the bits of the layers one by one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
import kdq_kernels as kk
from kdq.chain import ChainedSequential
from kdq.layers import low_bit_linear

SCHEMES = {
    "dynamic": kdq.Int8Dynamic(),
    "static": kdq.Int8Static(),
    "few bits": kdq.LowBit(weight_bits=3, act_bits=4),
    "mixed": {"0": kdq.Int8Static(), "3": kdq.LowBit(weight_bits=2, act_bits=8), "*": kdq.Int8Dynamic()},
}
X = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))


def make() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(20, 33), nn.ReLU(), nn.Dropout(0.5), nn.Linear(33, 70), nn.GELU(), nn.Linear(70, 9, bias=False)]
    return nn.Sequential(*layers).eval()


def quantized(config: Any = SCHEMES["dynamic"]) -> nn.Sequential:
    model = make()
    kdq.quantize_(model, config, calibration=[X])
    return model


def count_calls(model: nn.Module, x: Tensor = X) -> dict[str, int]:
    """How often each of the two operators is called in a forward pass."""
    with torch.profiler.profile() as profile:
        model(x)
    names = [event.name for event in profile.events()]
    return {name: names.count(f"kdq::{name}") for name in ("int8_linear", "int8_linear_chain")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_is_bit_for_bit_what_layers_compute(isa: str, scheme: str, dtype: torch.dtype) -> None:
    model = quantized(SCHEMES[scheme])
    chained = copy.deepcopy(model)
    report = kdq.chain_layers_(chained)
    assert report.changed == {"": "0 -> 3 -> 5 in one call"}
    assert type(chained) is ChainedSequential
    for x in (X.to(dtype), X[:1].to(dtype), X[0].to(dtype), X.to(dtype).expand(2, 3, 5, 20), X[:0].to(dtype)):
        assert chained(x).equal(model(x))
    assert count_calls(chained) == {"int8_linear": 0, "int8_linear_chain": 1}
    assert count_calls(model) == {"int8_linear": 3, "int8_linear_chain": 0}


def test_many_rows_go_by_bit_planes_where_these_are_faster(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit_linear, "LEAST_SIDE", 1)
    model = quantized(kdq.LowBit(weight_bits=1, act_bits=2))
    chained = copy.deepcopy(model)
    kdq.chain_layers_(chained)
    rows = X.repeat(20, 1)
    assert chained(rows).equal(model(rows))
    by_planes = kk.bitplane_pairs() >= 2
    assert count_calls(chained, rows)["int8_linear_chain"] == (0 if by_planes else 1)
    assert count_calls(chained, X[:1])["int8_linear_chain"] == 1


def test_other_layers_end_a_chain() -> None:
    model = quantized()
    model.insert(4, nn.LayerNorm(70))
    model.append(nn.Sequential(nn.Linear(9, 9), nn.Tanh()))
    plain = copy.deepcopy(model)
    report = kdq.chain_layers_(model)
    assert report.changed == {"": "0 -> 3 in one call"}
    assert list(report.left) == ["7"]
    assert model(X).equal(plain(X))
    assert count_calls(model) == {"int8_linear": 1, "int8_linear_chain": 1}


def test_weight_only_and_binary_layers_are_left() -> None:
    for config in (kdq.Int8WeightOnly(), kdq.Binary()):
        report = kdq.chain_layers_(quantized(config))
        assert not report.changed
        assert "no two layers" in report.left[""]


def test_a_sequential_with_code_of_its_own_is_left() -> None:
    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = 2 * super().forward(x)
            return y

    model = Doubled(*quantized())
    expected = model(X)
    assert "code of its own" in kdq.chain_layers_(nn.Sequential(model)).left["0"]
    assert model(X).equal(expected)


def test_hooks_that_come_later_are_called() -> None:
    model = quantized()
    kdq.chain_layers_(model)
    expected = model(X)
    seen: list[Tensor] = []
    handle = model[3].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert model(X).equal(expected)
    assert [x.shape for x in seen] == [(5, 70)]
    handle.remove()
    assert count_calls(model) == {"int8_linear": 0, "int8_linear_chain": 1}


def test_dropout_in_training_mode_drops() -> None:
    model = quantized()
    kdq.chain_layers_(model)
    model[2].train()
    assert not model(X).equal(model(X))


def test_gradients_reach_the_input() -> None:
    model = quantized()
    chained = copy.deepcopy(model)
    kdq.chain_layers_(chained)
    grads = []
    for m in (model, chained):
        x = X.clone().requires_grad_()
        m(x).square().sum().backward()
        grads.append(x.grad)
    assert grads[0] is not None
    assert grads[1] is not None
    assert grads[0].equal(grads[1])


def test_autocast_computes_in_its_dtype() -> None:
    model = quantized()
    chained = copy.deepcopy(model)
    kdq.chain_layers_(chained)
    with torch.autocast("cpu", torch.bfloat16):
        y = chained(X)
        assert y.dtype == torch.bfloat16
        assert y.equal(model(X))


def test_saved_it_is_a_plain_model(tmp_path: Path) -> None:
    model = quantized(SCHEMES["mixed"])
    expected = model(X)
    kdq.chain_layers_(model)
    kdq.save(model, tmp_path / "model.safetensors")
    rebuilt = kdq.load(tmp_path / "model.safetensors")
    assert type(rebuilt) is nn.Sequential
    assert rebuilt(X).equal(expected)
    assert kdq.load(tmp_path / "model.safetensors", make())(X).equal(expected)


def test_copies_and_pickles_stay_chained() -> None:
    model = quantized()
    kdq.chain_layers_(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model[:4]):
        assert count_calls(again) == {"int8_linear": 0, "int8_linear_chain": 1}
    assert kdq.chain_layers_(model).changed == {}  # it is already


def test_compiled_and_exported() -> None:
    model = quantized()
    kdq.chain_layers_(model)
    with torch.no_grad():
        expected = model(X)
        torch.compiler.reset()
        assert torch.compile(model, fullgraph=True)(X).equal(expected)
        exported = torch.export.export(model, (X,))
    assert [node.target for node in exported.graph.nodes].count(torch.ops.kdq.int8_linear_chain.default) == 1
    assert exported.module()(X).equal(expected)


def test_wrong_features_are_named() -> None:
    model = quantized()
    kdq.chain_layers_(model)
    with pytest.raises(ValueError, match=r"x: expected .*20.*got \[5, 19\]"):
        model(X[:, :19])


PACKED = kk.pack_int8_weight(torch.ones(20, 20, dtype=torch.int8))
SCALE = torch.ones(20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kk.int8_linear_chain(X, [], [], []), "packed: expected the weights of at least one layer"),
        (lambda: kk.int8_linear_chain(X, [PACKED] * 2, [SCALE], [None] * 2), "weight_scale: .* 2 layers, got 1"),
        (lambda: kk.int8_linear_chain(X, [PACKED] * 2, [SCALE] * 2, [None]), "bias: .* 2 layers, got 1"),
        (lambda: kk.int8_linear_chain(X, [PACKED], [SCALE], [None], activation=["tanh"]), "activation.*'tanh'"),
        (lambda: kk.int8_linear_chain(X, [PACKED], [SCALE], [None], input_quant_max=[255, 15]), "input_quant_max"),
        (lambda: kk.int8_linear_chain(X[:, :5], [PACKED], [SCALE], [None]), "x: has K = 5"),
    ],
)
def test_bad_arguments_raise_value_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
