"""`open_attention_`: what it changes and what it leaves; files, state dicts and copies of opened models."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import kdq
from attention_cases import HEADS, PAIR, E, L, encoder, layer, sequence, transformer
from kdq.layers import MultiheadAttention
from small_models import FOUR, INT8, randn


def test_the_report() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoderLayer(E, HEADS, 8),
            "decoder": nn.TransformerDecoderLayer(E, HEADS, 8, bias=False),
            "own": layer(),
            "wide": layer(kdim=5, vdim=6),
        }
    )
    report = kdq.open_attention_(model)
    same = "linear layers q_proj (12 -> 12), k_proj (12 -> 12), v_proj (12 -> 12), out_proj (12 -> 12)"
    assert report.changed == {
        "encoder.self_attn": same,
        "decoder.self_attn": same,
        "decoder.multihead_attn": same,
        "own": same,
        "wide": "linear layers q_proj (12 -> 12), k_proj (5 -> 12), v_proj (6 -> 12), out_proj (12 -> 12)",
    }
    assert report.left == {}
    assert kdq.open_attention_(model).changed == {}


def test_what_is_left_and_why() -> None:
    class Own(nn.MultiheadAttention):
        pass

    hooked, inner, own_forward = layer(), layer(), layer()
    hooked.register_forward_hook(lambda *_: None)
    inner.out_proj.register_forward_pre_hook(lambda *_: None)
    own_forward.forward = own_forward.forward  # type: ignore[method-assign]
    replaced = layer()
    replaced.out_proj = nn.Identity()  # type: ignore[assignment]
    left = {
        "subclass": (Own(E, HEADS), "Own is not nn.MultiheadAttention itself"),
        "hooked": (hooked, "it has hooks or a forward of its own"),
        "inner": (inner, "it has hooks or a forward of its own"),
        "own_forward": (own_forward, "it has hooks or a forward of its own"),
        "normed": (parametrizations.weight_norm(layer(), "in_proj_weight"), "parametrized"),
        "inner_normed": (layer(), "parametrized"),
        "bias_kv": (layer(add_bias_kv=True), "it has add_bias_kv"),
        "zero": (layer(add_zero_attn=True), "it has add_zero_attn"),
        "replaced": (replaced, "its out_proj is a Identity"),
        "filtered": (layer(), "filter_fn is false"),
        "with_layer": (layer(), "it has layers, parameters or buffers beside"),
        "with_buffer": (layer(), "it has layers, parameters or buffers beside"),
    }
    left["with_layer"][0].lora = nn.Linear(E, E)
    left["with_buffer"][0].register_buffer("extra", torch.ones(1))
    parametrizations.weight_norm(left["inner_normed"][0].out_proj)
    model = nn.ModuleDict({name: module for name, (module, _) in left.items()})
    model["taken"] = layer()
    report = kdq.open_attention_(model, lambda _, name: name != "filtered")
    assert report.changed.keys() == {"taken"}
    assert report.left.keys() == left.keys()
    for name, (module, reason) in left.items():
        assert reason in report.left[name]
        assert model[name] is module
    for name in ("subclass", "bias_kv", "zero", "replaced"):
        module, reason = left[name]
        with pytest.raises(ValueError, match=f"layer: {reason}"):
            MultiheadAttention(module)


def test_shared_modules_and_parameters_stay_shared() -> None:
    model = nn.ModuleDict({"a": layer()})
    model["b"] = model["a"]
    report = kdq.open_attention_(model)
    assert report.changed.keys() == {"a", "b"}
    assert model["a"] is model["b"]
    model = nn.ModuleDict({"a": layer()})
    model["b"] = model["a"]
    before = str(model)
    with pytest.raises(ValueError, match="filter_fn: 'a' and 'b' are one module, but it is true of the first alone"):
        kdq.open_attention_(model, lambda _, name: name == "a")
    assert str(model) == before

    tied = nn.ModuleDict({name: layer() for name in "abcdef"})
    tied["b"].in_proj_weight = tied["a"].in_proj_weight
    tied["d"].in_proj_bias = tied["c"].in_proj_bias
    tied["f"].out_proj.weight = tied["e"].out_proj.weight
    report = kdq.open_attention_(tied)
    assert report.left == dict.fromkeys(
        "abcd", "another module shares its in_proj_weight or in_proj_bias, which would be split"
    )
    assert report.changed.keys() == {"e", "f"}
    assert tied["e"].out_proj.weight is tied["f"].out_proj.weight


def test_the_model_itself_is_an_error() -> None:
    with pytest.raises(ValueError, match="the model itself is an nn.MultiheadAttention"):
        kdq.open_attention_(layer())


def test_what_parameters_are_stays() -> None:
    model = nn.ModuleDict({"a": layer(dtype=torch.bfloat16), "b": layer(kdim=5), "meta": layer(device="meta")}).eval()
    model["a"].train()
    model["a"].in_proj_weight.requires_grad_(False)
    model["b"].out_proj.weight.requires_grad_(False)
    key, out = model["b"].k_proj_weight, model["b"].out_proj.weight
    kdq.open_attention_(model)
    assert {m.training for m in model["a"].modules()} == {True}
    assert {m.training for m in model["b"].modules()} == {False}
    assert {p.dtype for p in model["a"].parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model["meta"].parameters()} == {"meta"}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {*(f"a.{name}_proj.weight" for name in "qkv"), "b.out_proj.weight"}
    assert model["b"].k_proj.weight is key
    assert model["b"].out_proj.weight is out
    assert all(type(m) is nn.Linear for a in model.values() for m in a.children())
    assert all(p.is_contiguous() and p.storage_offset() == 0 for p in model.parameters())


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"kdim": 5}], ids=str)
def test_state_dicts_of_what_it_was(arguments: dict[str, Any]) -> None:
    made = nn.ModuleDict({"a": layer(**arguments)})
    state = {name: randn(*tensor.shape, seed=9) for name, tensor in made.state_dict().items()}
    theirs = copy.deepcopy(made)
    theirs.load_state_dict(state)
    kdq.open_attention_(made)
    names = set(state)
    made.load_state_dict(state)
    assert set(state) == names
    q, k = sequence(L), sequence(L, arguments.get("kdim", E))
    torch.testing.assert_close(made["a"](q, k, q)[0], theirs["a"](q, k, q)[0])
    own = made.state_dict()
    made.load_state_dict(own)
    with pytest.raises(RuntimeError, match="Missing key.*out_proj.weight"):
        made.load_state_dict({name: tensor for name, tensor in state.items() if "out_proj.weight" not in name})
    if not arguments:
        with pytest.raises(RuntimeError, match="size mismatch for a"):
            made.load_state_dict(state | {"a.in_proj_weight": torch.zeros(2, E)})


# ---- files and copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [True, False])
def test_a_file_opens_the_model_that_it_is_loaded_into(quantized: bool, tmp_path: Path) -> None:
    model = transformer()
    kdq.open_attention_(model)
    if quantized:
        kdq.quantize_(model, {"*attn*": INT8, "*linear2": FOUR}, calibration=[(*PAIR, None)])
    kdq.save(model, tmp_path / "m")
    for opened in (True, False):
        fresh = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
        if opened:
            kdq.open_attention_(fresh)
        loaded: Any = kdq.load(tmp_path / "m", fresh)
        assert loaded is fresh
        assert str(loaded) == str(model)
        with torch.inference_mode():
            assert torch.equal(loaded(*PAIR), model(*PAIR))


def test_a_file_that_does_not_fit_leaves_the_model(tmp_path: Path) -> None:
    model = encoder().eval()
    kdq.open_attention_(model)
    kdq.quantize_(model, INT8)
    kdq.save(model, tmp_path / "m")
    wide = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 2).eval()
    hooked = encoder().eval()
    hooked.layers[1].self_attn.register_forward_hook(lambda *_: None)
    for other, message in ((wide, "linear1"), (hooked, "'layers.1.self_attn' was opened .* it has hooks")):
        before, attention = str(other), other.layers[0].self_attn
        with pytest.raises(ValueError, match=message):
            kdq.load(tmp_path / "m", other)
        assert str(other) == before
        assert other.layers[0].self_attn is attention
        assert other.use_nested_tensor
        assert other.layers[0].activation_relu_or_gelu


def test_a_closed_file_and_an_opened_model_are_told_apart(tmp_path: Path) -> None:
    closed, opened = transformer(), transformer()
    kdq.quantize_(closed, INT8)
    kdq.save(closed, tmp_path / "closed.safetensors")
    kdq.open_attention_(opened)
    with pytest.raises(ValueError, match=r"attention '.*self_attn' was opened by open_attention_, the file's was not"):
        kdq.load(tmp_path / "closed.safetensors", opened)


def test_subclasses_with_projections_of_their_own_are_loaded(tmp_path: Path) -> None:
    class Own(nn.MultiheadAttention):
        def __init__(self) -> None:
            super().__init__(E, HEADS)
            self.q_proj = nn.Linear(E, E)

    def make() -> nn.ModuleDict:
        return nn.ModuleDict({"attention": Own(), "linear": nn.Linear(E, E)})

    model = make()
    kdq.quantize_(model, {"linear": INT8})
    kdq.save(model, tmp_path / "own.safetensors")
    loaded = kdq.load(tmp_path / "own.safetensors", make())
    assert type(loaded.get_submodule("attention")) is Own


def test_copies_and_pickles() -> None:
    model = transformer()
    kdq.open_attention_(model)
    kdq.quantize_(model, INT8)
    closed_state = transformer().state_dict()
    with torch.inference_mode():
        expected = model(*PAIR)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(*PAIR), expected)
    plain = transformer()
    kdq.open_attention_(plain)
    copied = copy.deepcopy(plain)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    copied.load_state_dict(closed_state)
    assert torch.equal(copied(*PAIR), plain(*PAIR))
