"""Cross-layer equalization: even ranges of the channels between two linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kdq.observe import find_layer
from kdq.ptq.chains import Rewrites, chains, convolutions, names_of, used_twice, why_not_float
from kdq.ptq.tool_report import ToolReport

# f(s x) = s f(x) for s > 0: a channel's factor passes through.
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout)
ROUNDS = 40
CONVERGED = 1e-4


def equalize_(model: nn.Module, pairs: Iterable[tuple[str, str]] | None = None) -> ToolReport:
    """Cross-layer equalization (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
    2019): multiplies each channel between two linear layers so that its largest weight is the same on both sides.

    Between two layers with only ReLU, LeakyReLU, dropout or nothing, output channel i of the first may be divided by
    any s > 0 and column i of the second multiplied by it. `s = sqrt(max|w1[i]| * max|w2[:, i]|) / max|w2[:, i]|`, over
    all pairs until nothing moves. The float model computes the same to rounding. Needs no data.

    Args:
        pairs: names (first, second) of nn.Linear layers that follow each other, which the user vouches for; None: all
            that a plain nn.Sequential shows.

    Helps where a layer's columns differ much in range, as after folded batch norms, with few-bit weights, and where the
    activations' channels differ, with per-tensor activations. With 8-bit weights, whose scales are per output channel
    here anyway, and even channels there is little to gain; what data says about the activations, `smooth_` uses.

    Raises:
        TypeError: pairs is not made of pairs of names.
        ValueError: pairs names what is no nn.Linear, is shared, or does not fit; weights are NaN or infinite. Nothing
            was changed.
    """
    twice = used_twice(model)
    left: dict[str, str] = {}
    chosen = list(_found(model, twice, left) if pairs is None else _named(model, pairs, twice))
    rewrites = Rewrites()
    largest = dict.fromkeys((first for first, _ in chosen), 1.0)
    for _ in range(ROUNDS):
        moved = 0.0
        for first, second in chosen:
            a, b = model.get_submodule(first), model.get_submodule(second)
            factor = _factor(rewrites.of(a)[0], rewrites.of(b)[0])
            rewrites.scale_outputs(a, 1 / factor)
            rewrites.scale_inputs(b, factor)
            change = float(factor.log().abs().max().exp()) if len(factor) else 1.0
            largest[first] *= change
            moved = max(moved, change - 1)
        if moved < CONVERGED:
            break
    rewrites.carry_out(names_of(model))
    done = {first: f"equalized with {second}, factors up to {largest[first]:.3g}" for first, second in chosen}
    return ToolReport(done, left)


def _factor(first: Tensor, second: Tensor) -> Tensor:
    """s of each channel; 1 where a side is all zeros and has no range to even."""
    ours, theirs = first.abs().amax(1), second.abs().amax(0)
    factor = (ours / theirs).sqrt()
    return torch.where((ours > 0) & (theirs > 0), factor, torch.ones_like(factor))


def _found(model: nn.Module, twice: set[int], left: dict[str, str]) -> Iterator[tuple[str, str]]:
    left |= {name: "a convolution: only linear layers are equalized" for name, _ in convolutions(model)}
    for chain in chains(model):
        visible = [(name, module) for name, module in chain if type(module) not in HOMOGENEOUS]
        for (first, a), (second, b) in pairwise(visible):
            if type(a) is not nn.Linear:
                continue
            reason = why_not_float(a, (nn.Linear,), twice) or why_not_float(b, (nn.Linear,), twice)
            if reason is None:
                yield first, second
            else:
                left[first] = f"before {second}: {reason}"


def _named(model: nn.Module, pairs: Iterable[tuple[str, str]], twice: set[int]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise TypeError(f"pairs: expected pairs of layer names, got {pair!r}")
        a, b = (_linear(model, name, twice) for name in pair)
        if a is b or a.out_features != b.in_features:
            raise ValueError(
                f"pairs: {pair[0]!r} puts out {a.out_features} features, {pair[1]!r} takes {b.in_features}; "
                "expected two layers that follow each other"
            )
        yield pair[0], pair[1]


def _linear(model: nn.Module, name: str, twice: set[int]) -> Any:
    layer = find_layer(model, name, "pairs: the model")
    reason = why_not_float(layer, (nn.Linear,), twice)
    if reason is not None:
        raise ValueError(f"pairs: {name!r}: {reason}")
    return layer
