"""save and load: round trips, and that damaged or foreign files are refused and leave the model as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import kdq
from kdq.configs import Config

CONFIGS: list[Config] = [
    kdq.Int8Dynamic(),
    kdq.Int8Static(),
    kdq.Int8WeightOnly(),
    kdq.LowBit(weight_bits=3, act_bits=4),
    kdq.Binary(),
    kdq.Codebook(weight_bits=3),
]
X = torch.randn(11, 19, generator=torch.Generator().manual_seed(3))


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    head = nn.Sequential(nn.LayerNorm(70), nn.Linear(70, 5, bias=False))
    return nn.Sequential(nn.BatchNorm1d(19), nn.Linear(19, 70), nn.ReLU(), head).eval()


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x).relu()
        return y


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_round_trip(config: Config, tmp_path: Path) -> None:
    m = model()
    kdq.quantize_(m, config, calibration=[X])
    path = tmp_path / "m.safetensors"
    kdq.save(m, path)
    rebuilt = kdq.load(path)
    assert torch.equal(rebuilt(X), m(X))
    assert str(rebuilt) == str(m)
    into = model(seed=1)
    assert kdq.load(path, into) is into
    assert torch.equal(into(X), m(X))
    assert not list(tmp_path.glob("*.partial"))


def test_low_bit_checkpoints_are_small(tmp_path: Path) -> None:
    for bits in (8, 4, 2, 1):
        m = nn.Sequential(nn.Linear(512, 512, bias=False))
        kdq.quantize_(m, kdq.LowBit(weight_bits=bits, act_bits=8), calibration=[torch.randn(4, 512)])
        kdq.save(m, tmp_path / "m")
        assert 0 < (tmp_path / "m").stat().st_size - 512 * 512 * bits / 8 < 4096


def test_models_with_code_need_the_architecture(tmp_path: Path) -> None:
    m = Custom()
    kdq.quantize_(m, kdq.Int8Dynamic())
    kdq.save(m, tmp_path / "m")
    with pytest.raises(ValueError, match="model="):
        kdq.load(tmp_path / "m")
    assert torch.equal(kdq.load(tmp_path / "m", Custom())(X), m(X))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = model()
        self.outer = nn.ModuleList([self.inner, self.inner[1]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.outer[0](x) + self.outer[1](x)[:, :5]
        return y


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_layer_under_several_names_stays_one(config: Config, tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(19, 19)
    m = nn.Sequential(linear, nn.Tanh(), nn.Sequential(linear)).eval()
    kdq.quantize_(m, config, calibration=[X])
    kdq.save(m, tmp_path / "m")
    shared = nn.Linear(19, 19)
    for into in (
        None,
        nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared)),
        nn.Sequential(nn.Linear(19, 19), nn.Tanh(), nn.Sequential(nn.Linear(19, 19))),
    ):
        loaded: Any = kdq.load(tmp_path / "m", into)
        assert torch.equal(loaded(X), m(X))
        assert loaded[0] is loaded[2][0]
    tied = Tied().eval()
    kdq.quantize_(tied, config, calibration=[X])
    kdq.save(tied, tmp_path / "tied")
    assert torch.equal(kdq.load(tmp_path / "tied", Tied().eval())(X), tied(X))


def test_layers_with_hooks_are_not_replaced(tmp_path: Path) -> None:
    m = model()
    kdq.quantize_(m, kdq.Int8Dynamic())
    kdq.save(m, tmp_path / "m")
    watched = model()
    watched[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layer '1' has hooks"):
        kdq.load(tmp_path / "m", watched)
    assert type(watched[1]) is nn.Linear


def test_training_twins_are_not_saved(tmp_path: Path) -> None:
    m = model()
    kdq.prepare_qat_(m, kdq.Int8Dynamic())
    with pytest.raises(ValueError, match="convert_"):
        kdq.save(m, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    m = model()
    kdq.quantize_(m, kdq.Int8Dynamic())
    kdq.save(m, tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        target = model(seed=1)
        expected = target(X)
        with pytest.raises(ValueError, match="cut"):
            kdq.load(tmp_path / "cut", target)
        assert torch.equal(target(X), expected)


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        kdq.load(tmp_path / "missing")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="quantization map"):
        kdq.load(tmp_path / "foreign")

    m = model()
    kdq.quantize_(m, kdq.Int8Dynamic())
    kdq.save(m, tmp_path / "good")
    tensors = load_file(tmp_path / "good")
    with safe_open(tmp_path / "good", "pt") as file:
        info = json.loads(file.metadata()["kdq"])

    def refuse(message: str, *, info: Any = info, tensors: Any = tensors) -> None:
        save_file(tensors, tmp_path / "bad", metadata={"kdq": json.dumps(info)})
        target = model(seed=1)
        expected = target(X)
        with pytest.raises(ValueError, match=message):
            kdq.load(tmp_path / "bad", target)
        assert torch.equal(target(X), expected)

    refuse("version", info={**info, "version": 99})
    refuse("not valid", info={"version": 1})
    refuse("'1' is not valid", info={**info, "layers": {"1": {"type": "Int4Linear"}}})
    refuse("'2' is said to be the same as '3'", info={**info, "layers": {**info["layers"], "2": {"same_as": "3"}}})
    refuse("layer 'nowhere'", info={**info, "layers": {"nowhere": info["layers"]["1"]}})
    refuse("lacks 1.weight", tensors={k: t for k, t in tensors.items() if k != "1.weight"})
    refuse("surplus", tensors={**tensors, "surplus": torch.zeros(1)})
    refuse("'1.weight'", tensors={**tensors, "1.weight": torch.zeros(70, 18, dtype=torch.int8)})
    refuse("'1.weight'", tensors={**tensors, "1.weight": torch.zeros(70, 19)})
    refuse("1.weight_scale", tensors={**tensors, "1.weight_scale": torch.full((70,), float("nan"))})


def test_wrong_architecture(tmp_path: Path) -> None:
    m = model()
    kdq.quantize_(m, kdq.Int8Dynamic())
    kdq.save(m, tmp_path / "m")
    other = model()
    other[1] = nn.Linear(19, 71)
    with pytest.raises(ValueError, match="layer '1' is linear 19 -> 70"):
        kdq.load(tmp_path / "m", other)
    assert type(other[1]) is nn.Linear


def test_shared_modules_come_back_under_each_name(tmp_path: Path) -> None:
    def shared() -> nn.Sequential:
        layer, activation = nn.Linear(19, 19), nn.Tanh()
        return nn.Sequential(layer, activation, layer, activation).eval()

    m = shared()
    kdq.quantize_(m, kdq.LowBit(weight_bits=3, act_bits=4), calibration=[X])
    kdq.save(m, tmp_path / "m.safetensors")
    for loaded in (kdq.load(tmp_path / "m.safetensors"), kdq.load(tmp_path / "m.safetensors", shared())):
        assert torch.equal(loaded(X), m(X))
