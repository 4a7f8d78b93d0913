"""What a layer costs at a precision: bits and bytes by arithmetic, milliseconds by measurement.

Layers are timed inside the model's own forward pass, one uniform precision after the other, so that each meets the
caches as its neighbours leave them.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.checkpoint import write_atomically
from kdq.configs import Binary, Codebook, Config, Int8Static, LowBit, config_from_json, config_to_json
from kdq.observe import Batch
from kdq.reporting import ROUND_SECONDS
from kdq.search.precision import Precision, all_at


def weight_bits(linear: nn.Linear, config: Config | None) -> int:
    """Bits of one weight; None is the float layer as it is."""
    if config is None:
        return 8 * linear.weight.element_size()
    if isinstance(config, Binary):
        return 1
    return config.weight_bits if isinstance(config, LowBit | Codebook) else 8


def layer_bytes(linear: nn.Linear, config: Config | None) -> int:
    """Bytes of the layer's tensors as `kdq.save` writes them."""
    n, k = linear.weight.shape
    if config is None:
        return linear.weight.nbytes + (0 if linear.bias is None else linear.bias.nbytes)
    bias = 0 if linear.bias is None else 4 * n
    if isinstance(config, Codebook):
        return math.ceil(n / 16) * 64 * math.ceil(k / (32 // config.weight_bits)) + 4 * 2**config.weight_bits + bias
    row = (k + 63) // 64 * 8 if isinstance(config, Binary) else (k * weight_bits(linear, config) + 7) // 8
    grid = 8 if isinstance(config, Int8Static | LowBit) else 0  # input_scale and input_zero_point
    return n * (row + 4) + bias + grid


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a state dict's tensors, shared ones under each name, as `kdq.save` writes them."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


@dataclass(frozen=True)
class Timing:
    """`layers[config][name]` and `fixed`, the rest of the model: milliseconds of one forward pass."""

    layers: Mapping[Config | None, Mapping[str, float]]
    fixed: float

    def to_json(self) -> dict[str, Any]:
        """Ready for json.dumps."""
        layers = [[None if c is None else config_to_json(c), dict(ms)] for c, ms in self.layers.items()]
        return {"layers": layers, "fixed": self.fixed}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timing:
        """The inverse of `to_json`."""
        return cls({None if c is None else config_from_json(c): dict(ms) for c, ms in data["layers"]}, data["fixed"])


class OtherTimes(ValueError):
    """A file of times that were measured of something else, or in other circumstances."""


def circumstances(layers: Mapping[str, nn.Linear], rows: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What times depend on besides the candidates, ready for JSON: the layers, the rows of each of their calls, and how
    this process computes. The processor itself is not known."""
    return {
        "layers": {name: [*layers[name].weight.shape, str(layers[name].weight.dtype), *rows[name]] for name in rows},
        "cpu_isa": kk.cpu_isa(),
        "threads": torch.get_num_threads(),
    }


def keep_timing(path: Path, timing: Timing, of: Mapping[str, Any]) -> None:
    """Writes a file for `kept_timing`, of these `circumstances`."""
    text = json.dumps({**timing.to_json(), "of": of}, indent=1) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text))


def kept_timing(path: Path, candidates: Sequence[Config | None], of: Mapping[str, Any]) -> Timing | None:
    """What `measure` gave and a file has; None where there is no file.

    Raises:
        OtherTimes: the file is of other candidates or `circumstances`.
        ValueError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        timing, before = Timing.from_json(data), _by_word(data["of"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"times: {path} is not a file of times; delete it to measure anew: {error}") from error
    names = of["layers"].keys()
    if timing.layers.keys() != set(candidates) or any(ms.keys() != names for ms in timing.layers.values()):
        raise OtherTimes(f"times: {path} is of other layers or candidates; choose another file")
    now = _by_word(of)
    for what in now:
        if before.get(what) != now[what]:
            raise OtherTimes(
                f"times: {path} is of {what} {before.get(what)}, expected {now[what]}; choose another file"
            )
    return timing


def _by_word(of: Mapping[str, Any]) -> dict[str, Any]:
    """`circumstances` by what a message calls them."""
    layers = {f"layer {name!r} (sides, dtype, rows)": known for name, known in of["layers"].items()}
    return {**layers, "cpu_isa": of["cpu_isa"], "threads": of["threads"]}


def input_rows(model: nn.Module, names: Sequence[str], batch: Batch) -> dict[str, list[int]]:
    """For each layer, the number of rows (product of all axes but the last) of every call in one forward pass."""
    rows: dict[str, list[int]] = {name: [] for name in names}

    def hook_for(name: str) -> Any:
        return lambda _module, args: rows[name].append(math.prod(args[0].shape[:-1]))

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    try:
        batch.logits(model, "student")
    finally:
        for handle in handles:
            handle.remove()
    return rows


def measure(
    model: nn.Module,
    precision: Precision,
    names: Sequence[str],
    candidates: Sequence[Config | None],
    batch: Batch,
    rounds: int,
) -> Timing:
    """Times every layer at every precision, and the model without its layers: medians of interleaved rounds.

    The time between a layer's pre-hook and its hook is the layer's; what calls it belongs to the rest, which is the
    whole model's time, without hooks, less its layers'. The rest is that of the fastest precision, which large float
    products do not drown in their noise. At another precision it takes longer or shorter (caches as its layers leave
    them): its layers' times bear the difference, each in proportion, so that they add up to what the whole model takes.
    """
    configs = list(dict.fromkeys(candidates))
    spans: dict[Config | None, dict[str, list[float]]] = {c: {n: [] for n in names} for c in configs}
    totals: dict[Config | None, list[float]] = {c: [] for c in configs}
    repeats = {}
    for config in configs:
        with all_at(precision, dict.fromkeys(names, config)):
            repeats[config] = _repeats(model, batch)
    for _ in range(rounds):
        for config in configs:
            with all_at(precision, dict.fromkeys(names, config)):
                _seconds(model, batch, 1)  # the weights come into the caches
                totals[config].append(_seconds(model, batch, repeats[config]))
                with _stopwatch(model, names) as watch:
                    _seconds(model, batch, repeats[config])
            for name in names:
                spans[config][name].append(watch[name] / repeats[config])
    whole = {c: 1e3 * statistics.median(seconds) for c, seconds in totals.items()}
    layers = {c: {n: 1e3 * statistics.median(s) for n, s in by_name.items()} for c, by_name in spans.items()}
    fastest = min(configs, key=lambda c: whole[c])
    fixed = max(whole[fastest] - math.fsum(layers[fastest].values()), 0.0)
    return Timing({c: _summing_to(whole[c] - fixed, layers[c]) for c in configs}, fixed)


def whole_ms(model: nn.Module, batch: Batch, rounds: int) -> float:
    """Milliseconds of a forward pass of the model as it is, measured as the sums of `measure` are."""
    repeat = _repeats(model, batch)
    return 1e3 * statistics.median(_seconds(model, batch, repeat) for _ in range(rounds))


def _repeats(model: nn.Module, batch: Batch) -> int:
    """Of the forward pass, for a round."""
    return max(1, round(ROUND_SECONDS / max(min(_seconds(model, batch, 1) for _ in range(3)), 1e-7)))


def _summing_to(total: float, parts: Mapping[str, float]) -> dict[str, float]:
    """The parts in proportion."""
    factor = total / math.fsum(parts.values())
    return {name: factor * part for name, part in parts.items()}


def _seconds(model: nn.Module, batch: Batch, repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        model(*batch.args, **batch.kwargs)
    return (time.perf_counter() - start) / repeat


@contextmanager
def _stopwatch(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, float]]:
    """Fills a dict with the seconds that the named layers take inside."""
    seconds = dict.fromkeys(names, 0.0)
    started = dict.fromkeys(names, 0.0)

    def before(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            started[name] = time.perf_counter()

        return hook

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, _output: Tensor) -> None:
            seconds[name] += time.perf_counter() - started[name]

        return hook

    layers = {name: model.get_submodule(name) for name in names}
    handles = [layer.register_forward_pre_hook(before(name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(after(name)) for name, layer in layers.items()]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
