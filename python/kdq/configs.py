"""What to do with a layer: one frozen dataclass a scheme. They validate on construction and round-trip through JSON."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

METHODS = ("lsq", "pact", "dorefa")


@dataclass(frozen=True, kw_only=True)
class Int8Dynamic:
    """int8 weights per output channel; activations int8 per row (in a convolution per image), their scale computed at
    run time. Needs no calibration."""


@dataclass(frozen=True, kw_only=True)
class Int8Static:
    """int8 weights per output channel; activations unsigned 8 bits per tensor, their scale fixed by calibration or
    training."""


@dataclass(frozen=True, kw_only=True)
class Int8WeightOnly:
    """int8 weights per output channel; activations stay in floating point. Halves to quarters the weight's bytes.
    For linear layers and embeddings."""


@dataclass(frozen=True, kw_only=True)
class LowBit:
    """Weights of 1 to 8 bits per output channel, unsigned activations of 2 to 8 bits per tensor.

    `LowBit(weight_bits=1, act_bits=1)` is `Binary()`.

    method: how `prepare_qat_` trains the grids.
        "lsq": scales of weights and activations and the activations' zero point are learned (LSQ, Esser et al. 2020;
            LSQ+, Bhalgat et al. 2020). The only one that `quantize_` takes, too.
        "pact": activations in [0, alpha], alpha learned by PACT's gradient (Choi et al. 2018), weights as in "lsq". For
            inputs after a ReLU: negative values become 0.
        "dorefa": DoReFa-Net (Zhou et al. 2016): activations in [0, 1], weights on 2**bits odd levels between -1 and 1,
            for 2 to 7 weight bits. Nothing is learned but the weights; the layer's scale is lost, so that a norm should
            follow.
    """

    weight_bits: int
    act_bits: int
    method: str = "lsq"

    def __post_init__(self) -> None:
        for name, bits in (("weight_bits", self.weight_bits), ("act_bits", self.act_bits)):
            if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
                raise ValueError(f"{name}: expected an integer from 1 to 8, got {bits!r}")
        if self.act_bits == 1 and self.weight_bits != 1:
            raise ValueError(
                f"act_bits: 1-bit activations need weight_bits=1 (binary kernels), got weight_bits={self.weight_bits}"
            )
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method != "lsq" and self.act_bits == 1:
            raise ValueError(f"act_bits: method {self.method!r} needs 2 bits or more, got 1")
        if self.method == "dorefa" and not 2 <= self.weight_bits <= 7:
            raise ValueError(
                f"weight_bits: DoReFa's odd levels take from 2 to 7 bits on the int8 kernels, got {self.weight_bits}; "
                "method='lsq' has all from 1 to 8"
            )


@dataclass(frozen=True, kw_only=True)
class Binary:
    """±1 weights with one scale an output channel, ±1 activations: XNOR-Net (Rastegari et al. 2016).

    A layer sees only the signs of its inputs. Where these are never negative, as behind a ReLU, it puts out the same
    for all: a batch or layer norm belongs right before it. `quantize_` (by the model's structure) and the training twin
    (by its first batch) warn.
    """


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """Weights that share `2**weight_bits` float32 values a layer (Han, Mao, Dally: Deep Compression, 2016), 1 to 5
    bits; activations stay in floating point. `prepare_qat_` finetunes the values. Exact zeros stay: they take one. For
    linear layers."""

    weight_bits: int = 4

    def __post_init__(self) -> None:
        if (
            not isinstance(self.weight_bits, int)
            or isinstance(self.weight_bits, bool)
            or not 1 <= self.weight_bits <= 5
        ):
            raise ValueError(f"weight_bits: expected an integer from 1 to 5, got {self.weight_bits!r}")


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """Of a layer that `prune_` changed, in reports: the share of its weights that are 0. No scheme to quantize by."""

    sparsity: float


Config: TypeAlias = Int8Dynamic | Int8Static | Int8WeightOnly | LowBit | Binary | Codebook
CONFIGS: dict[str, type[Config]] = {
    cls.__name__: cls for cls in (Int8Dynamic, Int8Static, Int8WeightOnly, LowBit, Binary, Codebook)
}


class LayerConfigs(Mapping[str, Config]):
    """Base of mappings whose keys are layer names, taken as they are: `[`, `*` and `?` mean themselves."""


class ExactConfigs(dict[str, Config], LayerConfigs):
    """A dict of that kind."""


# One config for every layer, or configs by layer name or pattern (as in fnmatch: "encoder.*.fc1"); see `assign`.
ConfigMap: TypeAlias = Config | Mapping[str, Config]


def normalize(config: Config) -> Config:
    """`LowBit(weight_bits=1, act_bits=1)` as `Binary()`; anything else as it is.

    Raises:
        TypeError: config is not one of this module's.
    """
    if not isinstance(config, tuple(CONFIGS.values())):
        raise TypeError(f"config: expected one of {', '.join(CONFIGS)}, got {config!r}")
    return Binary() if config == LowBit(weight_bits=1, act_bits=1) else config


def check_configs(configs: ConfigMap) -> None:
    """Raises TypeError if a config, or one of a mapping's, is not one of this module's."""
    for config in configs.values() if isinstance(configs, Mapping) else [configs]:
        normalize(config)


def assign(configs: ConfigMap, names: Collection[str], role: str = "config") -> dict[str, Config | None]:
    """The config of each of the names; None where nothing matches. The one rule of all functions that take a mapping:
    a layer's exact name counts before patterns, and of these the first that matches. A key that is the exact name of a
    layer is no pattern for others.

    Args:
        names: of all layers that configs may speak of.
        role: the argument that messages name.

    Raises:
        TypeError: a config is not one of this module's.
        ValueError: a name or pattern matches none of the names.
    """
    check_configs(configs)
    if not isinstance(configs, Mapping):
        return dict.fromkeys(names, normalize(configs))

    exact = set(configs) if isinstance(configs, LayerConfigs) else set(names)  # keys that are no patterns

    def covers(key: str, name: str) -> bool:
        return key == name or (key not in exact and fnmatch.fnmatchcase(name, key))

    for key in configs:
        if not any(covers(key, name) for name in names):
            near = difflib.get_close_matches(key, list(names), n=3, cutoff=0.4) or list(names)[:8]
            there = f"there are, for example, {', '.join(map(repr, near))}" if near else "there are none"
            raise ValueError(f"{role}: {key!r} is neither the name of a layer nor a pattern that matches one; {there}")
    keys = {n: n if n in configs else next((key for key in configs if covers(key, n)), None) for n in names}
    return {name: None if key is None else normalize(configs[key]) for name, key in keys.items()}


def bits_of(config: Config) -> tuple[int, int]:
    """Bits of the weights and of the activations; activations that stay in floating point count 16."""
    if isinstance(config, Binary):
        return 1, 1
    if isinstance(config, LowBit):
        return config.weight_bits, config.act_bits
    if isinstance(config, Codebook):
        return config.weight_bits, 16
    return 8, 16 if isinstance(config, Int8WeightOnly) else 8


def short_name(config: Config | None) -> str:
    """For tables and plots: "Int8Dynamic", "LowBit w2 a8", "LowBit w4 a4 pact", "Codebook w4"; None is "float"."""
    if isinstance(config, Codebook):
        return f"Codebook w{config.weight_bits}"
    if not isinstance(config, LowBit):
        return "float" if config is None else type(config).__name__
    method = "" if config.method == "lsq" else f" {config.method}"
    return f"LowBit w{config.weight_bits} a{config.act_bits}{method}"


def config_to_json(config: Config) -> dict[str, Any]:
    """`{"type": "LowBit", "weight_bits": 2, "act_bits": 4}`; the method only where it is not "lsq"."""
    data = {"type": type(config).__name__, **asdict(config)}
    if data.get("method") == "lsq":
        del data["method"]  # readers older than the field take this too
    return data


def config_from_json(data: Mapping[str, Any]) -> Config:
    """The inverse of `config_to_json`.

    Raises:
        ValueError: the type is unknown, or a field is missing, unknown or out of range.
    """
    fields = dict(data)
    name = fields.pop("type", None)
    if name not in CONFIGS:
        raise ValueError(f"config: expected a type among {', '.join(CONFIGS)}, got {name!r}")
    try:
        return CONFIGS[name](**fields)
    except TypeError as error:
        raise ValueError(f"config: {name} does not take these fields: {error}") from error
