"""Models with opened attention: torch's transformer layers compute the same, and all that takes layers takes theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
from attention_cases import CAUSAL, PAIR, L, S, encoder, transformer
from kdq.configs import Config
from kdq.layers import MultiheadAttention
from kdq.planning import ConversionReport
from small_models import FOUR, INT8, ONE, TWO, randn

SOURCE = torch.arange(L) >= torch.tensor([[5], [3], [4]])


# ---- torch's transformer layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False], ids=["norm_first", "norm_last"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "length_first"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("quantized", [True, False], ids=["int8", "float"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_encoders(norm_first: bool, batch_first: bool, bias: bool, quantized: bool) -> None:
    theirs = encoder(norm_first=norm_first, batch_first=batch_first, bias=bias, activation="gelu", dropout=0.0)
    ours = copy.deepcopy(theirs)
    kdq.open_attention_(ours)
    if quantized:
        kdq.quantize_(ours, INT8)
    x = randn(3, L, 16)
    x = x if batch_first else x.transpose(0, 1)
    kept = ~SOURCE if batch_first else ~SOURCE.T
    masks: list[dict[str, Tensor]] = [
        {},
        {"src_key_padding_mask": SOURCE},
        {"mask": CAUSAL},
        {"mask": CAUSAL, "src_key_padding_mask": SOURCE},
    ]
    tolerance = 0.05 if quantized else 1e-5
    for training in (True, False):
        for grad in (True, False):
            for given in masks:
                found = []
                for model in (theirs, ours):
                    with torch.inference_mode(not grad):
                        found.append(model.train(training)(x, **given)[kept])
                error = (found[1] - found[0]).norm() / found[0].norm()
                assert error < tolerance
                assert (error > 1e-4) == quantized  # its layers did run


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_decoders(norm_first: bool, quantized: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.Transformer(16, 2, 1, 2, 32, batch_first=True, norm_first=norm_first, dropout=0.0)
    ours = copy.deepcopy(theirs)
    assert len(kdq.open_attention_(ours).changed) == 5
    if quantized:
        assert len(kdq.quantize_(ours, INT8).changed) == 4 + 2 + 2 * (4 + 4 + 2)
    source, target = randn(3, L, 16), randn(3, S, 16, seed=1)
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(S),
        "src_key_padding_mask": SOURCE.float() * -9,
        "memory_key_padding_mask": SOURCE.float() * -9,
    }
    for given in ({}, masks):
        expected = theirs(source, target, **given)
        for grad in (True, False):
            with torch.inference_mode(not grad):
                got = ours.train(grad)(source, target, **given)
            error = (got - expected).norm() / expected.norm()
            assert 1e-4 < error < 0.05 if quantized else error < 1e-5


def test_an_encoder_made_of_an_opened_layer() -> None:
    one = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)})
    kdq.open_attention_(one)
    with pytest.warns(UserWarning, match="use_nested_tensor is False"):
        model = nn.TransformerEncoder(one["layer"], 2).eval()  # type: ignore[arg-type]
    with torch.inference_mode():
        assert model(randn(3, L, 16), src_key_padding_mask=SOURCE).isfinite().all()


# ---- what is done with layers ----------------------------------------------------------------------------------------


def test_closed_attention_is_named_in_reports() -> None:
    names = {"layers.0.self_attn", "layers.0.self_attn.out_proj"}
    changes: list[Callable[[nn.Module], ConversionReport]] = [
        lambda m: kdq.quantize_(m, INT8),
        lambda m: kdq.prepare_qat_(m, {"*": FOUR}),
        lambda m: kdq.prepare_switchable_(m, [INT8, FOUR]),
        lambda m: kdq.convert_(m, {"*": INT8}),
    ]
    for change in changes:
        report = change(encoder())
        for name in names:
            assert "call kdq.open_attention_ first" in report.left[name]
        opened = encoder()
        kdq.open_attention_(opened)
        report = change(opened)
        assert names & report.left.keys() == set()
        assert {f"layers.0.self_attn.{name}_proj" for name in ("q", "k", "v", "out")} <= report.changed.keys()


@pytest.mark.parametrize("config", [INT8, kdq.Int8Static(), kdq.Int8WeightOnly(), FOUR, kdq.Codebook()], ids=str)
def test_quantized_encoders_stay_close(config: Config) -> None:
    model, x = encoder().eval(), randn(8, L, 16)
    kdq.open_attention_(model)
    plain = copy.deepcopy(model)
    report = kdq.quantize_(model, config, calibration=[x])
    assert sum(name.endswith("_proj") for name in report.changed) == 8
    with torch.inference_mode():
        got, expected = model(x), plain(x)
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < (0.05 if config in (INT8, kdq.Int8Static(), kdq.Int8WeightOnly()) else 0.3)


@pytest.mark.parametrize("config", [INT8, kdq.Int8Static(), FOUR, TWO, ONE, kdq.Codebook()], ids=str)
@pytest.mark.parametrize("make", [encoder, lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True)], ids=["e", "t"])
def test_training_and_inference_agree(config: Config, make: Callable[[], nn.Module]) -> None:
    """Rounding differences may tip an integer over in later layers, so that each attention is compared by itself."""
    torch.manual_seed(0)
    model, x = make(), randn(3, L, 16)
    args = (x,) if isinstance(model, nn.TransformerEncoder) else (x, randn(3, S, 16, seed=1))
    kdq.open_attention_(model)
    kdq.prepare_qat_(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(*args).square().mean().backward()
        optimizer.step()
    twins = {n: m for n, m in model.eval().named_modules() if isinstance(m, MultiheadAttention)}
    assert all(p.grad is not None for twin in twins.values() for p in twin.parameters())
    trained = copy.deepcopy(model)
    kdq.convert_(model)
    query, memory = randn(3, L, 16, seed=2), randn(3, S, 16, seed=3)
    for name in twins:
        twin: Any = trained.get_submodule(name)
        real: Any = model.get_submodule(name)
        layers = dict(real.named_children())
        assert not any(type(v) is nn.Linear for v in layers.values())
        with torch.no_grad():
            for part, made in layers.items():  # float inputs: the same integers
                torch.testing.assert_close(made(query), getattr(twin, part)(query), rtol=1e-4, atol=1e-5)
            y, expected = real(query, memory, memory)[0], twin(query, memory, memory)[0]
        # One integer may differ where attention's rounding does: a step of a few of the outputs.
        assert (y - expected).abs().median() < 1e-4
        assert ((y - expected).abs() < 1e-3).float().mean() > 0.9


def test_switchable_search_and_transfer() -> None:
    model, x = encoder(dropout=0.0), randn(8, L, 16)
    kdq.open_attention_(model)
    teacher = copy.deepcopy(model)
    plan = kdq.search_precision(
        copy.deepcopy(model), teacher, [x], budget=kdq.Budget(average_bits=5), candidates=[INT8, TWO], progress=False
    )
    assert {"layers.0.self_attn.v_proj", "layers.1.self_attn.out_proj"} <= plan.keys()
    kdq.prepare_switchable_(model, [INT8, FOUR])
    report = kdq.transfer_(teacher, model, {"layers.0": "layers.1"}, freeze=True)
    assert "layers.0.self_attn.v_proj" in report.changed
    assert torch.equal(model.layers[0].self_attn.v_proj.weight, teacher.layers[1].self_attn.v_proj.weight)
    with torch.no_grad():
        for config in (INT8, FOUR):
            kdq.set_precision_(model, config)
            model(x)
    small = kdq.extract(model.eval(), {"*.v_proj": FOUR, "*": INT8})
    assert type(small.layers[0].self_attn.v_proj) is kdq.LowBitLinear
    with torch.inference_mode():
        assert small(x).isfinite().all()


def test_distillation_reaches_the_projections() -> None:
    teacher, student = encoder(dropout=0.0), encoder(dropout=0.0)
    for model in (teacher, student):
        kdq.open_attention_(model)
    with torch.no_grad():
        student.layers[0].self_attn.v_proj.weight.mul_(0.5)
    kdq.prepare_qat_(student, INT8)
    hint = kdq.Hint({"layers.0.self_attn.v_proj": "layers.0.self_attn.v_proj"})
    distiller = kdq.Distiller(teacher, student, [kdq.SoftTargets(T=2), hint])
    losses = distiller.fit([randn(8, L, 16)], epochs=60, lr=2e-3).losses
    assert losses[-1] < losses[0] / 2
    kdq.convert_(student.eval())
    report = kdq.report(student, teacher, [randn(8, L, 16)])
    assert "layers.1.self_attn.out_proj" in {error.name for error in report.layers}


@pytest.mark.parametrize("quantized", [True, False])
def test_compiles_and_exports(quantized: bool) -> None:
    model = transformer()
    kdq.open_attention_(model)
    if quantized:
        kdq.quantize_(model, INT8)
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(*PAIR)
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(*PAIR), expected, rtol=1e-3, atol=1e-3)
        exported = torch.export.export(model, PAIR)
        torch.testing.assert_close(exported.module()(*PAIR), expected, rtol=1e-4, atol=1e-4)
    if quantized:
        linear, attention = 4 + 2 + (4 + 4 + 2), 3
        assert sum(str(node.target).startswith("kdq.") for node in exported.graph.nodes) == linear + attention
    torch.compiler.reset()
