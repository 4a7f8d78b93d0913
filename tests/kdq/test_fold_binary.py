"""fold_binary_chain_: thresholds equal batch norm and sign for every dot product; the chain's result is the same."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import kdq
import kdq_kernels as kk
from kdq.fold_binary import fold_binary_chain_, integer_thresholds
from small_models import randn


def norm_of(n: int, seed: int, affine: bool = True) -> nn.BatchNorm1d:
    """A norm as after training, with negative, zero and tiny factors among its own."""
    norm = nn.BatchNorm1d(n, affine=affine).eval()
    generator = torch.Generator().manual_seed(seed)
    norm.running_mean = torch.randn(n, generator=generator) * 3
    norm.running_var = torch.rand(n, generator=generator) * 20 + 1e-3
    if affine:
        with torch.no_grad():
            norm.weight.copy_(torch.randn(n, generator=generator))
            norm.bias.copy_(torch.randn(n, generator=generator))
            norm.weight[::7] = 0
            norm.weight[1::7] *= 1e-12
            norm.bias[::14] *= -1
    return norm


def layer_of(k: int, n: int, seed: int) -> kdq.BinaryLinear:
    linear = nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.copy_(randn(n, k, seed=seed))
        linear.bias.copy_(randn(n, seed=seed + 1))
    return kdq.BinaryLinear.from_float(linear)


def every_dot(k: int) -> tuple[Tensor, Tensor]:
    """Inputs `[k + 1, k]` whose dot products with weights of +1 are k, k - 2, ..., -k; and these."""
    counts = torch.arange(k + 1)
    return torch.where(torch.arange(k) < counts[:, None], -1.0, 1.0), k - 2 * counts


@pytest.mark.parametrize("between", [[], [nn.Hardtanh()], [nn.ReLU()], [nn.Tanh(), nn.Dropout()]])
@pytest.mark.parametrize("k", [1, 2, 63, 64, 257, 1500])
def test_bits_of_every_dot_product(isa: str, k: int, between: list[nn.Module]) -> None:
    """Against the modules themselves, for all k + 1 dot products of all channels: exhaustive."""
    n = 70
    layer = layer_of(k, n, seed=k)
    layer.weight_bits.zero_()
    before, after = between[:1], between[1:]
    steps = [*before, norm_of(n, k), *after]
    x, dots = every_dot(k)
    for first in ([*steps], [norm_of(n, k), *between]):  # the activation before the norm, and behind it
        y = layer(x)
        for module in copy.deepcopy(first):
            y = module.eval()(y)
        threshold, inverted, is_step = integer_thresholds(layer, first)
        assert is_step.all()
        signed = torch.where(inverted, -dots[:, None], dots[:, None])
        torch.testing.assert_close(signed < threshold, y < 0, rtol=0, atol=0)
        model = nn.Sequential(layer, *first, layer_of(n, 3, 0))
        folded = copy.deepcopy(model)
        fold_binary_chain_(folded)
        torch.testing.assert_close(kk.unpack_signs(folded[0](x), n) < 0, y < 0, rtol=0, atol=0)


@pytest.mark.parametrize("k", [1, 6, 64, 255])
def test_bits_equal_exact_arithmetic_where_float32_is_exact(k: int) -> None:
    """Against rational numbers: dyadic parameters, so that no digit is lost, and many results that are zero."""
    n, generator = 97, torch.Generator().manual_seed(k)
    layer, norm = layer_of(k, n, 0), nn.BatchNorm1d(n, eps=2.0**-10).eval()
    layer.weight_bits.zero_()

    def dyadic(low: int, high: int, step: float) -> Tensor:
        return torch.randint(low, high, (n,), generator=generator) * step

    layer.weight_scale, layer.bias = 2.0 ** dyadic(-3, 1, 1.0), dyadic(-8, 9, 0.25)
    norm.running_mean, norm.running_var = dyadic(-8, 9, 0.25), 4.0 ** dyadic(-1, 2, 1.0) - 2.0**-10
    with torch.no_grad():
        norm.weight.copy_(dyadic(-3, 4, 0.5))
        norm.bias.copy_(dyadic(-8, 9, 0.25))
    threshold, inverted, is_step = integer_thresholds(layer, [norm.requires_grad_(False)])
    assert is_step.all()
    zeros = 0
    for c in range(n):
        scale, bias, mean = (Fraction(float(t[c])) for t in (layer.weight_scale, layer.bias, norm.running_mean))
        gamma, beta = Fraction(float(norm.weight[c])), Fraction(float(norm.bias[c]))
        deviation = Fraction(float((norm.running_var[c] + norm.eps).sqrt()))
        assert deviation in (Fraction(1, 2), 1, 2)
        for dot in range(-k, k + 1, 2):
            exact = (dot * scale + bias - mean) / deviation * gamma + beta
            zeros += exact == 0
            assert ((-dot if inverted[c] else dot) < threshold[c]) == (exact < 0)
    assert zeros > 0


def chain(affine: bool = True) -> nn.Sequential:
    """Twins' chain as after training, converted: 50-130-70-5."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm1d(50),
        nn.Linear(50, 130),
        nn.BatchNorm1d(130, affine=affine),
        nn.Hardtanh(),
        nn.Sequential(nn.Linear(130, 70, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(70, affine=affine)),
        nn.Linear(70, 5),
    )
    kdq.prepare_qat_(model, kdq.Binary())
    for i, norm in ((2, model[2]), (4, model[4][3])):
        norm.load_state_dict(norm_of(norm.num_features, i, affine).state_dict())
    kdq.convert_(model)
    return model.eval()


@torch.inference_mode()
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_folded_chain_gives_the_same_bits(isa: str, rows: int, affine: bool) -> None:
    model = chain(affine)
    folded = copy.deepcopy(model)
    report = fold_binary_chain_(folded)
    assert report.changed == {
        "1": "to thresholds, with 2, 3",
        "2": "into 1",
        "3": "into 1",
        "4.0": "to thresholds, with 4.1, 4.2, 4.3",
        **dict.fromkeys(("4.1", "4.2", "4.3"), "into 4.0"),
    }
    assert report.left == {"5": "no binary layer follows it"}
    x = randn(rows, 50, seed=rows)
    hidden = folded[1](folded[0](x))
    assert hidden.dtype == torch.int64
    torch.testing.assert_close(hidden, kk.pack_signs(model[:4](x)), rtol=0, atol=0)
    torch.testing.assert_close(folded[4](folded[2:4](hidden)), kk.pack_signs(model[:5](x)), rtol=0, atol=0)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)
    assert fold_binary_chain_(folded).left == report.left


@torch.no_grad()
def test_folded_chain_is_saved_copied_and_exported(tmp_path) -> None:
    model = chain()
    x = randn(4, 50)
    expected = model(x)
    fold_binary_chain_(model)
    kdq.save(model, tmp_path / "model.safetensors")
    for other in (
        kdq.load(tmp_path / "model.safetensors"),
        kdq.load(tmp_path / "model.safetensors", copy.deepcopy(model)),
        pickle.loads(pickle.dumps(model)),
        torch.export.export(model, (x,)).module(),
    ):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).argmax(1).equal(expected.argmax(1))
    linear = model[1].to_float()
    signs = torch.where(model[0](x) < 0, -1.0, 1.0)
    torch.testing.assert_close(kk.pack_signs(linear(signs)), model[1](signs), rtol=0, atol=0)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output)
    return layer


SHARED = norm_of(8, 0)
LEFT: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "another module between": (
        nn.Sequential(layer_of(6, 8, 0), nn.LayerNorm(8), layer_of(8, 2, 1)),
        {"0": "'1' behind it is a LayerNorm", "2": "no binary layer follows it"},
    ),
    "a float layer follows": (
        nn.Sequential(layer_of(6, 8, 0), nn.BatchNorm1d(8), nn.Linear(8, 2)),
        {"0": "'2' behind it is a Linear"},
    ),
    "no statistics": (
        nn.Sequential(layer_of(6, 8, 0), nn.BatchNorm1d(8, track_running_stats=False), layer_of(8, 2, 1)),
        {"0": "'1' keeps no running statistics", "2": "no binary layer follows it"},
    ),
    "a shared norm": (
        nn.Sequential(layer_of(6, 8, 0), SHARED, layer_of(8, 8, 1), SHARED, layer_of(8, 2, 1)),
        {
            "0": "'1' is used elsewhere in the model",
            "2": "'3' is used elsewhere in the model",
            "4": "no binary layer follows it",
        },
    ),
    "a hook": (
        nn.Sequential(layer_of(6, 8, 0), hooked(nn.Hardtanh()), layer_of(8, 2, 1)),
        {
            "0": "'1' has hooks or a forward of its own; remove them first",
            "2": "no binary layer follows it",
        },
    ),
    "bfloat16": (
        nn.Sequential(layer_of(6, 8, 0), norm_of(8, 1), layer_of(8, 2, 1)).bfloat16(),
        {"0": "'1' is not of float32", "2": "no binary layer follows it"},
    ),
    "no Sequential": (nn.ModuleDict({"a": layer_of(6, 8, 0)}), {"a": "it is not in a plain nn.Sequential"}),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name: str) -> None:
    model, left = LEFT[name]
    before = str(model)
    report = fold_binary_chain_(model)
    assert (report.changed, report.left) == ({}, left)
    assert str(model) == before


def test_twins_are_left() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    kdq.prepare_qat_(model, kdq.Binary())
    assert fold_binary_chain_(model).left == dict.fromkeys(("0", "2"), "a training twin; call convert_ first")


def test_bad_inputs_of_a_folded_layer() -> None:
    layer = kdq.BinaryThresholdLinear(70, 3)
    with pytest.raises(ValueError, match=r"x: expected 2 axes, \[batch, 70\].*got \[2, 5, 70\]"):
        layer(torch.ones(2, 5, 70))
    with pytest.raises(ValueError, match="x: expected 70 features"):
        layer(torch.ones(2, 71))
    with pytest.raises(ValueError, match="x: expected 2 words"):
        layer(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="x needs a gradient, which bits cannot carry"):
        layer(torch.ones(2, 70, requires_grad=True))
    with pytest.raises(ValueError, match="bias"):
        kdq.BinaryThresholdLinear(70, 3, bias=True)
