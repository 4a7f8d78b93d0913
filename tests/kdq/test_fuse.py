"""Activations in the layers' kernels: the same function as before, fused only where the structure says so."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kdq
from kdq.configs import Config
from kdq.layers.base import ACTIVATION_FUNCTIONS, ACTIVATION_MODULES
from kdq.layers.qat import QATLinear
from kdq.reporting import layer_errors

CONFIGS: list[Config] = [
    kdq.Int8Dynamic(),
    kdq.Int8Static(),
    kdq.Int8WeightOnly(),
    kdq.Codebook(weight_bits=3),
    kdq.LowBit(weight_bits=3, act_bits=4),
    kdq.LowBit(weight_bits=1, act_bits=4),
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=str)
every_activation = pytest.mark.parametrize("activation", ACTIVATION_MODULES)
INT8 = kdq.Int8Dynamic()
X = torch.randn(23, 19, generator=torch.Generator().manual_seed(3))


def mlp(activation: nn.Module | None = None, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(19, 70), activation or nn.ReLU(), nn.Linear(70, 5)).eval()


def pair(model: nn.Module, config: Config = INT8) -> tuple[Any, Any]:
    """A model quantized with and without fusion."""
    fused, plain = copy.deepcopy(model), copy.deepcopy(model)
    assert kdq.quantize_(fused, config, calibration=[X]).fused
    assert not kdq.quantize_(plain, config, calibration=[X], fuse_activations=False).fused
    return fused, plain


def assert_same(got: Tensor, expected: Tensor, activation: str, dtype: torch.dtype = torch.float32) -> None:
    """ReLU to the bit; the others to rounding, which in 16 bits happens once instead of twice."""
    if activation == "relu":
        assert torch.equal(got, expected)
    else:
        tolerance = 3e-6 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ---- the same function -----------------------------------------------------------------------------------------------


@every_config
@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_with_its_activation_is_the_layer_then_the_activation(
    config: Config, activation: str, dtype: torch.dtype
) -> None:
    fused, plain = (m[0] for m in pair(mlp(ACTIVATION_MODULES[activation]()), config))
    x = X.to(dtype)
    expected = ACTIVATION_FUNCTIONS[activation](plain(x))
    assert plain.activation is None
    assert fused.activation == activation
    assert f"activation={activation!r}" in repr(fused)
    assert_same(fused(x), expected, activation, dtype)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(copied(x), fused(x))


@every_config
@every_activation
def test_trained_twins_and_their_fused_layers_agree(config: Config, activation: str) -> None:
    model = mlp(ACTIVATION_MODULES[activation]())
    kdq.prepare_qat_(model, config)
    assert isinstance(model[0], QATLinear)
    assert type(model[1]) is ACTIVATION_MODULES[activation], "training keeps its activation"
    with torch.no_grad():
        model(X)
        expected = model[:2](X)
        report = kdq.convert_(model)
        got = model[:2](X)
    assert report.fused == {"0": activation}
    assert f"+ {activation}" in str(report)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@every_activation
def test_gradient_passes_the_activation(activation: str) -> None:
    fused, plain = pair(mlp(ACTIVATION_MODULES[activation]()))
    gradients = []
    for model in (fused, plain):
        x = X.clone().requires_grad_()
        model(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@every_activation
def test_to_float_gives_the_activation_back(activation: str) -> None:
    fused, _ = pair(mlp(ACTIVATION_MODULES[activation]()))
    restored = fused[0].to_float()
    assert torch.equal(restored[0].weight, fused[0].dequantized_weight())
    assert type(restored[1]) is ACTIVATION_MODULES[activation]
    assert type(fused[2].to_float()) is nn.Linear


def test_activations_by_hand() -> None:
    layer = kdq.Int8Linear.from_float(mlp()[0], activation="silu")
    assert layer.activation == "silu"
    with pytest.raises(ValueError, match="activation: expected None or one of 'relu', 'gelu', 'silu', got 'tanh'"):
        kdq.Int8Linear(2, 2, config=INT8, activation="tanh")
    binary = kdq.BinaryLinear(2, 2)
    binary.activation = "relu"
    with pytest.raises(ValueError, match="activation: the binary kernels compute none"):
        binary(X[:, :2])


def test_names_and_state_dict_stay() -> None:
    fused, plain = pair(mlp())
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert type(fused[1]) is nn.Identity
    assert not fused[1].training


# ---- only where the structure says so --------------------------------------------------------------------------------


class OwnSequential(nn.Sequential):
    """Uses the linear layer's output twice."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[0](x)
        return self[2](self[1](y)) + y.mean()


class OwnReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OwnLayer(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear2(self.activation(self.linear1(x)) + self.linear1(x))
        return y


def shared_linear() -> nn.Module:
    linear = nn.Linear(19, 19)
    return nn.Sequential(linear, nn.ReLU(), linear)


def hooked(which: int, register: str) -> nn.Module:
    model = mlp()
    getattr(model[which], register)(lambda *_: None)
    return model


def own_forward() -> nn.Module:
    model = mlp()
    model[1].forward = lambda x: x  # type: ignore[method-assign]
    return model


def watched_identity() -> nn.Module:
    model = nn.Sequential(nn.Linear(19, 5), nn.Identity(), nn.ReLU())
    model[1].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: OwnSequential(*mlp()),
        lambda: mlp(OwnReLU()),
        own_forward,
        lambda: mlp(nn.GELU("tanh")),
        lambda: mlp(nn.Tanh()),
        lambda: nn.Sequential(nn.Linear(19, 5), nn.Dropout(0.5), nn.ReLU()),
        lambda: nn.Sequential(nn.Sequential(nn.Linear(19, 5)), nn.ReLU()),
        watched_identity,
        lambda: nn.Sequential(nn.ReLU(), nn.Linear(19, 5)),
        lambda: nn.ModuleList([nn.Linear(19, 5), nn.ReLU()]),
        shared_linear,
        lambda: hooked(1, "register_forward_hook"),
        lambda: hooked(1, "register_forward_pre_hook"),
        lambda: hooked(1, "register_full_backward_hook"),
        lambda: OwnLayer(16, 2, 32),
        lambda: nn.TransformerEncoderLayer(16, 2, 32, activation=nn.GELU("tanh")),
        lambda: nn.TransformerEncoderLayer(16, 2, 32, activation=lambda x: x.relu()),
    ],
)
def test_what_is_not_fused(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = sum(isinstance(m, nn.Identity) for m in model.modules())
    report = kdq.quantize_(model, INT8)
    assert report.changed
    assert not report.fused
    assert sum(isinstance(m, nn.Identity) for m in model.modules()) == before


def test_binary_layers_keep_the_activation_behind_them() -> None:
    model = mlp()
    report = kdq.quantize_(model, {"0": kdq.Binary(), "2": INT8})
    assert not report.fused
    assert type(model[1]) is nn.ReLU


def test_a_shared_activation_is_taken_out_only_where_it_was_fused() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(19, 8), relu, nn.LayerNorm(8), relu, nn.Linear(8, 8), relu).eval()
    fused, plain = pair(model)
    assert [type(fused[i]) for i in (1, 3, 5)] == [nn.Identity, nn.ReLU, nn.Identity]
    assert torch.equal(fused(X), plain(X))


def test_what_a_folded_batch_norm_leaves_is_looked_through(tmp_path: Path) -> None:
    def folded(seed: int = 0) -> nn.Sequential:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(19, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
        model(3 * X + 1)
        kdq.fold_batch_norm_(model.eval())
        return model

    model = folded()
    fused, plain = pair(model)
    assert [type(fused[i]) for i in (1, 2)] == [nn.Identity, nn.Identity]
    assert fused[0].activation == "relu"
    assert torch.equal(fused(X), plain(X))
    assert kdq.quantize_(model, INT8).fused == {"0": "relu"}
    kdq.save(fused, tmp_path / "m")
    kdq.save(plain, tmp_path / "plain")
    for loaded in (kdq.load(tmp_path / "m"), kdq.load(tmp_path / "m", folded(1)), kdq.load(tmp_path / "m", fused)):
        assert torch.equal(loaded(X), fused(X))
    assert torch.equal(kdq.load(tmp_path / "plain", folded(1))(X), plain(X)), "a file of before stays unfused"


def test_a_subclass_of_sequential_is_fused() -> None:
    class Named(nn.Sequential):
        pass

    fused, plain = pair(Named(*mlp()))
    assert torch.equal(fused(X), plain(X))


def test_a_block_under_two_names_is_fused_once() -> None:
    block = nn.Sequential(nn.Linear(19, 19), nn.ReLU())
    model = nn.Sequential(block, block)
    fused, plain = pair(model)
    assert fused[0] is fused[1]
    assert torch.equal(fused(X), plain(X))


# ---- transformers ----------------------------------------------------------------------------------------------------


def encoder(activation: Any, norm_first: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, activation, batch_first=True, norm_first=norm_first)
    packs = layer.activation_relu_or_gelu != 0 and not norm_first
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=packs).eval()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    ("given", "name"),
    [("relu", "relu"), ("gelu", "gelu"), (F.silu, "silu"), (torch.relu, "relu"), (nn.GELU(), "gelu")],
    ids=str,
)
def test_transformer_encoders(given: Any, name: str, norm_first: bool, tmp_path: Path) -> None:
    model = encoder(given, norm_first)
    fused, plain = pair(model)
    assert {n: m.activation for n, m in fused.named_modules() if n.endswith("linear1")} == {
        f"layers.{i}.linear1": name for i in (0, 1)
    }
    x = torch.randn(3, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    kdq.save(fused, tmp_path / "m")
    loaded = kdq.load(tmp_path / "m", copy.deepcopy(model))
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            expected = plain(x, src_key_padding_mask=padding)
            for same in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), loaded):
                # Not to the bit even for ReLU: torch's float attention depends on where its weights lie in memory.
                torch.testing.assert_close(same(x, src_key_padding_mask=padding), expected, rtol=1e-5, atol=1e-5)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@every_config
@every_activation
def test_checkpoints_fuse_what_they_were_saved_with(config: Config, activation: str, tmp_path: Path) -> None:
    fused, plain = pair(mlp(ACTIVATION_MODULES[activation]()), config)
    kdq.save(fused, tmp_path / "fused")
    kdq.save(plain, tmp_path / "plain")
    assert str(kdq.load(tmp_path / "fused")) == str(fused)
    targets = [mlp(ACTIVATION_MODULES[activation](), seed=1), copy.deepcopy(plain), copy.deepcopy(fused)]
    for target in targets:
        assert torch.equal(kdq.load(tmp_path / "fused", target)(X), fused(X))
        assert str(target) == str(fused)
    unfused = kdq.load(tmp_path / "plain", mlp(ACTIVATION_MODULES[activation](), seed=1))
    assert torch.equal(unfused(X), plain(X))


def test_models_that_would_compute_something_else_are_refused(tmp_path: Path) -> None:
    fused, plain = pair(mlp())
    kdq.save(fused, tmp_path / "fused")
    kdq.save(plain, tmp_path / "plain")
    other, _ = pair(mlp(nn.GELU()))
    hooked_model = hooked(1, "register_forward_hook")
    for file, target, found in (
        ("fused", mlp(nn.GELU()), "gelu"),
        ("fused", mlp(nn.Identity()), "None"),
        ("fused", OwnSequential(*mlp()), "None"),
        ("fused", hooked_model, "None"),
        ("fused", other, "gelu"),
        ("plain", fused, "relu"),
    ):
        before = str(target)
        with pytest.raises(ValueError, match=f"layer '0' computes the activation .* the model's has {found}"):
            kdq.load(tmp_path / file, target)
        assert str(target) == before


def test_files_of_version_1_still_load(tmp_path: Path) -> None:
    """Rewritten as the version before activations wrote it."""
    _, plain = pair(mlp())
    kdq.save(plain, tmp_path / "m")
    with safe_open(tmp_path / "m", "pt") as file:
        info = json.loads(file.metadata()["kdq"])
    assert "activation" not in info["layers"]["0"]
    save_file(load_file(tmp_path / "m"), tmp_path / "old", metadata={"kdq": json.dumps({**info, "version": 1})})
    assert torch.equal(kdq.load(tmp_path / "old")(X), plain(X))
    info["layers"]["0"]["activation"] = "tanh"
    save_file(load_file(tmp_path / "m"), tmp_path / "bad", metadata={"kdq": json.dumps(info)})
    with pytest.raises(ValueError, match="layer '0' is not valid: activation"):
        kdq.load(tmp_path / "bad")


# ---- reports and hints -----------------------------------------------------------------------------------------------


@every_activation
def test_layer_errors_compare_after_the_activation(activation: str) -> None:
    model = mlp(ACTIVATION_MODULES[activation]())
    fused, plain = pair(model)
    function = ACTIVATION_FUNCTIONS[activation]
    with torch.no_grad():
        expected, output = function(model[0](X)).double(), function(plain[0](X)).double()
    sqnr = float(20 * torch.log10(expected.norm() / (expected - output).norm()))
    first = layer_errors(fused, model, X)[0]
    assert first.kind == f"Int8Linear + {activation}"
    assert first.sqnr_db == pytest.approx(sqnr, abs=0.01)
    both = {layer.name: layer.sqnr_db for layer in layer_errors(plain, fused, X)}
    assert both["0"] > 100, "a fused reference is met after the activation too"


def test_hints_do_not_take_an_activated_output_for_a_linear_layers() -> None:
    fused, plain = pair(mlp())
    for teacher, student, role in ((fused, mlp(), "teacher"), (mlp(), fused, "student")):
        with pytest.raises(ValueError, match=f"{role} layer '0' computes its relu too"):
            kdq.Distiller(teacher, student, losses=[kdq.Hint({"0": "0"})]).loss(X)
        assert torch.isfinite(kdq.Distiller(teacher, student, losses=[kdq.Hint({"1": "1"})]).loss(X))
    assert torch.isfinite(kdq.Distiller(plain, mlp(), losses=[kdq.Hint({"0": "0"})]).loss(X))
