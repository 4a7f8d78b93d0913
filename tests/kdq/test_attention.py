"""Attention that consists of linear layers: the same as nn.MultiheadAttention, and taken by all that takes layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import kdq
from kdq.configs import Config
from kdq.layers import MultiheadAttention
from kdq.planning import ConversionReport
from small_models import FOUR, INT8, ONE, TWO, randn

E, HEADS, N, L, S = 12, 3, 2, 5, 7
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)


def layer(**arguments: Any) -> nn.MultiheadAttention:
    """With a bias that is not zero."""
    torch.manual_seed(0)
    made = nn.MultiheadAttention(E, HEADS, **arguments)
    with torch.no_grad():
        for bias in (made.in_proj_bias, made.out_proj.bias):
            if bias is not None:
                bias.normal_()
    return made


def sequence(length: int, width: int = E, *, batch_first: bool = True, batched: bool = True, seed: int = 0) -> Tensor:
    x = randn(N, length, width, seed=seed)
    return x[0] if not batched else x if batch_first else x.transpose(0, 1).contiguous()


def both(theirs: nn.Module, ours: nn.Module, *args: Any, **kwargs: Any) -> list[list[Tensor | None]]:
    """Results of both, with the same random numbers, and gradients of their inputs."""
    found = []
    for module in (theirs, ours):
        torch.manual_seed(1)
        leaves = {id(x): x.detach().clone().requires_grad_() for x in args}
        y, weights = module(*(leaves[id(x)] for x in args), **kwargs)
        loss = y.square().sum() if weights is None else y.square().sum() + weights.square().sum()
        loss.backward()
        found.append([y, weights, *(x.grad for x in leaves.values())])
    return found


def close(found: list[list[Tensor | None]]) -> None:
    theirs, ours = found
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        if a is None:
            assert b is None
        else:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def encoder(**arguments: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    one = nn.TransformerEncoderLayer(16, 2, 32, **{"batch_first": True, **arguments})
    return nn.TransformerEncoder(one, 2, enable_nested_tensor=not one.norm_first and one.self_attn.batch_first)


# ---- the same as nn.MultiheadAttention -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "length_first"])
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "no_batch"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("training", [True, False], ids=["dropout", "eval"])
@pytest.mark.parametrize("weights", [None, True, False], ids=["no_weights", "averaged", "by_head"])
def test_self_attention(batch_first: bool, batched: bool, bias: bool, training: bool, weights: bool | None) -> None:
    theirs = layer(batch_first=batch_first, bias=bias, dropout=0.3).train(training)
    ours = MultiheadAttention(theirs)
    x = sequence(L, batch_first=batch_first, batched=batched)
    close(both(theirs, ours, x, x, x, need_weights=weights is not None, average_attn_weights=bool(weights)))


@pytest.mark.parametrize("same", ["none", "key is value", "query is key", "query is value"])
def test_queries_keys_and_values_of_their_own(same: str) -> None:
    theirs = layer(batch_first=True)
    q, k, v = (sequence(L, seed=i) for i in range(3))
    if same == "none":
        k, v = sequence(S, seed=1), sequence(S, seed=2)
    k = v if same == "key is value" else q if same == "query is key" else k
    v = q if same == "query is value" else v
    close(both(theirs, MultiheadAttention(theirs), q, k, v))
    close(both(theirs, MultiheadAttention(theirs), q, k, v, need_weights=False))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(6, 10), (E, 10), (6, E)], ids=str)
def test_keys_and_values_of_other_widths(batch_first: bool, bias: bool, widths: tuple[int, int]) -> None:
    theirs = layer(batch_first=batch_first, bias=bias, kdim=widths[0], vdim=widths[1])
    sides = ((L, E), (S, widths[0]), (S, widths[1]))
    args = [sequence(*side, batch_first=batch_first, seed=i) for i, side in enumerate(sides)]
    close(both(theirs, MultiheadAttention(theirs), *args))


def test_gradients_of_parameters() -> None:
    theirs = layer(batch_first=True)
    ours = MultiheadAttention(theirs)
    q, k, v = sequence(L), sequence(S, seed=1), sequence(S, seed=2)
    found = []
    for module in (theirs, ours):
        module.zero_grad()
        module(q, k, v, need_weights=False)[0].square().sum().backward()
        found.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    expected, got = found
    for kind in ("weight", "bias"):
        packed = torch.cat([got.pop(f"{name}_proj.{kind}") for name in "qkv"])
        torch.testing.assert_close(packed, expected.pop(f"in_proj_{kind}"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


PADDING = torch.arange(L) >= torch.tensor([[4], [3]])
HEADWISE = torch.stack([CAUSAL, CAUSAL.T, CAUSAL & CAUSAL.T] * N)
MASKS: dict[str, dict[str, Any]] = {
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": randn(N, L, seed=3)},
    "2d": {"attn_mask": CAUSAL},
    "float 2d": {"attn_mask": randn(L, L, seed=4)},
    "3d": {"attn_mask": HEADWISE},
    "float 3d": {"attn_mask": randn(N * HEADS, L, L, seed=5)},
    "padding and 2d": {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
    "padding and 3d": {"key_padding_mask": PADDING, "attn_mask": HEADWISE},
    "float padding and 3d": {"key_padding_mask": randn(N, L, seed=3), "attn_mask": randn(N * HEADS, L, L, seed=5)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal and padding": {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": PADDING},
    "nothing to see": {"key_padding_mask": torch.tensor([[False] * L, [True] * L])},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "length_first"])
@pytest.mark.parametrize("grad", [True, False], ids=["by_torch", "by_kernel"])
def test_masks(masks: dict[str, Any], need_weights: bool, batch_first: bool, grad: bool) -> None:
    theirs = layer(batch_first=batch_first)
    ours = MultiheadAttention(theirs)
    x = sequence(L, batch_first=batch_first)
    with torch.set_grad_enabled(grad):
        expected, got = (m(x, x, x, need_weights=need_weights, **masks) for m in (theirs, ours))
        plain = ours(x, x, x, need_weights=need_weights)[0]
    assert not torch.allclose(got[0], plain)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_without_a_batch(need_weights: bool) -> None:
    theirs = layer()
    ours = MultiheadAttention(theirs)
    q, k = sequence(L, batched=False), sequence(S, batched=False, seed=1)
    for masks in (
        {"key_padding_mask": torch.arange(S) >= 4},
        {"attn_mask": randn(L, S) > 1},
        {"attn_mask": randn(HEADS, L, S) > 1},
        {"attn_mask": randn(HEADS, L, S), "key_padding_mask": randn(S)},
    ):
        close([list(m(q, k, k, need_weights=need_weights, **masks)) for m in (theirs, ours)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    theirs = layer(batch_first=True, dtype=dtype)
    ours = MultiheadAttention(theirs)
    x = sequence(L).to(dtype)
    for y, expected in zip(ours(x, x, x, PADDING), theirs(x, x, x, PADDING), strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_a_learned_mask_gets_its_gradient() -> None:
    theirs = layer(batch_first=True).requires_grad_(False)
    ours = MultiheadAttention(theirs)
    x = sequence(L)
    grads = []
    for m in (theirs, ours):
        bias = randn(L, L, seed=6).requires_grad_()
        m(x, x, x, attn_mask=bias, need_weights=False)[0].square().sum().backward()
        grads.append(bias.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_forward_mode_is_left_to_torch() -> None:
    """Which says that it has none for its own kernel; the one here would give zeros in silence."""
    ours = MultiheadAttention(layer(batch_first=True).requires_grad_(False))
    x = sequence(L)
    with pytest.raises(NotImplementedError, match="forward"):
        torch.func.jvp(lambda x: ours(x, x, x, need_weights=False)[0], (x,), (x,))


def test_autocast() -> None:
    theirs = layer(batch_first=True)
    ours = MultiheadAttention(theirs)
    x = sequence(L)
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (True, False):
            expected, got = (m(x, x, x, PADDING, need_weights=need_weights)[0] for m in (theirs, ours))
            assert got.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (((L, E), (S, E), (N, S, E)), {}, r"value: expected 2 axes, 12 features in the last, got \[2, 7, 12\]"),
        (((E,), (E,), (E,)), {}, "query: expected 3 axes, or 2 without a batch, got 1"),
        (((N, L, 8), (N, S, E), (N, S, E)), {}, r"query: expected 3 axes, 12 features in the last, got \[2, 5, 8\]"),
        (((N, L, E), (N, S, 8), (N, S, E)), {}, r"key: expected 3 axes, 12 features in the last, got \[2, 7, 8\]"),
        (
            ((N, L, E), (N, S, E), (N, L, E)),
            {},
            r"value: expected the positions of key, \[2, 7, 12\], got \[2, 5, 12\]",
        ),
        (((N, L, E), (3, S, E), (3, S, E)), {}, "key: expected a batch of 2, as query has, got 3"),
        (((N, L, E),) * 3, {"is_causal": True}, "is_causal: expected attn_mask too"),
        (((N, L, E),) * 3, {"attn_mask": CAUSAL[:3]}, r"attn_mask: expected \[5, 5\] or \[6, 5, 5\], got \[3, 5\]"),
        (((N, L, E),) * 3, {"attn_mask": HEADWISE[:3]}, r"attn_mask: expected .*, got \[3, 5, 5\]"),
        (((N, L, E),) * 3, {"attn_mask": CAUSAL.int()}, "attn_mask: expected bool or a float dtype, got torch.int32"),
        (((N, L, E),) * 3, {"key_padding_mask": PADDING[0]}, r"key_padding_mask: expected \[2, 5\], got \[5\]"),
        (((L, E),) * 3, {"key_padding_mask": PADDING}, r"key_padding_mask: expected \[5\], got \[2, 5\]"),
    ],
)
def test_bad_inputs(args: Any, kwargs: dict[str, Any], message: str) -> None:
    ours = MultiheadAttention(layer(batch_first=True))
    with pytest.raises(ValueError, match=message):
        ours(*(torch.zeros(shape) for shape in args), **kwargs)


def test_nested_tensors_are_refused() -> None:
    ours = MultiheadAttention(layer(batch_first=True))
    x = torch.nested.nested_tensor([torch.zeros(L, E), torch.zeros(S, E)])
    with pytest.raises(ValueError, match="query: expected a padded tensor and key_padding_mask, got a nested tensor"):
        ours(x, x, x)


# ---- open_attention_ -------------------------------------------------------------------------------------------------


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


# ---- torch's transformer layers --------------------------------------------------------------------------------------


SOURCE = torch.arange(L) >= torch.tensor([[5], [3], [4]])


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


# ---- files, copies, compilers ----------------------------------------------------------------------------------------


def transformer() -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()


PAIR = (randn(3, L, 16), randn(3, S, 16, seed=1))  # source and target


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
