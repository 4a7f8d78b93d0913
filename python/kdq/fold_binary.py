"""fold_binary_chain_: hidden binary layers, their batch norms and the signs between them as integer thresholds.

Between two binary layers only a sign is passed on, and what leads there from a channel's integer dot product is a step:
on one side of some integer -1, on the other +1. So no algebra on batch norm's parameters is needed, which would differ
from its float arithmetic in the last digit: the modules themselves are run once on each of the K + 1 values that a dot
product of K signs can have, and the step is read off.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.fuse import has_own_code
from kdq.layers.binary_linear import BinaryLinear
from kdq.layers.binary_threshold_linear import BinaryThresholdLinear
from kdq.layers.conv2d import BinaryConv2d
from kdq.layers.qat import BinaryQATConv2d, BinaryQATLinear
from kdq.ptq.chains import Named, chains, used_twice
from kdq.ptq.tool_report import ToolReport
from kdq.qnn import QuantizeGradient, ShiftBatchNorm1d

NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, ShiftBatchNorm1d)
# Beside these, what works element by element and, in eval mode, does not depend on anything else.
ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Dropout,
    nn.Hardtanh,
    nn.ReLU,
    nn.Tanh,
    QuantizeGradient,
)
BLOCK = 1024  # dot products that are tried at once


@dataclass
class Link:
    """A binary layer and what its result goes through before the next one takes the signs."""

    name: str
    layer: BinaryLinear
    steps: list[Named] = field(default_factory=list)


def fold_binary_chain_(model: nn.Module) -> ToolReport:
    """Lets binary layers that follow each other pass bits, in place: each but the last of a chain becomes a
    `BinaryThresholdLinear`, and the batch norm and the activations between them become nn.Identity, so that names hold.

    A chain is found in nn.Sequential: `BinaryLinear`, then any of BatchNorm1d and ShiftBatchNorm1d (as in eval mode),
    Hardtanh, ReLU, Tanh, Dropout, QuantizeGradient and Identity, then a `BinaryLinear`. The thresholds give exactly the
    bits that the modules gave, for every dot product that can occur, also where a norm's factor is negative or zero
    (Hubara et al., "Quantized Neural Networks", 2016): the chain's result is the same, bit for bit. An instruction set
    that rounds `binary_linear` differently then gives the bits of the one in force now. To be called after `convert_`,
    on a model of float32; inputs of a folded layer have two axes.

    Returns:
        The layers that were folded and the modules that they took in; of the other binary layers, why they were left.
    """
    twice = used_twice(model)
    found: dict[str, BinaryThresholdLinear] = {}
    changed: dict[str, str] = {}
    left: dict[str, str] = {}
    seen: set[str] = set()
    for chain in chains(model):
        for at, (name, layer) in enumerate(chain):
            if not isinstance(layer, BinaryLinear):
                continue
            seen.add(name)
            link = Link(name, layer)
            reason = _follow(link, chain[at + 1 :], twice) or _fold(link, found)
            if reason is not None:
                left[name] = reason
                continue
            inner = [step for step, module in link.steps if type(module) is not nn.Identity]
            changed[name] = "to thresholds" + (f", with {', '.join(inner)}" if inner else "")
            changed |= dict.fromkeys(inner, f"into {name}")
    for name, module in model.named_modules():
        if isinstance(module, BinaryConv2d | BinaryQATConv2d):
            left[name] = "a convolution: thresholds are for linear layers"
        elif isinstance(module, BinaryQATLinear):
            left[name] = "a training twin; call convert_ first"
        elif isinstance(module, BinaryLinear) and name not in seen:
            left[name] = "it is not in a plain nn.Sequential"
    for name in changed:
        replacement = found.get(name, nn.Identity())
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, replacement.train(model.get_submodule(name).training))
    return ToolReport(changed, left)


def _follow(link: Link, rest: list[Named], twice: set[int]) -> str | None:
    """Collects the steps up to the next binary layer; the reason if there is none to reach."""
    if type(link.layer) is not BinaryLinear:
        return f"{type(link.layer).__name__} is a subclass of BinaryLinear, whose own code might do something else"
    width = link.layer.out_features
    for name, module in [(link.name, link.layer), *rest]:
        if has_own_code(module):
            return f"{name!r} has hooks or a forward of its own; remove them first"
        if isinstance(module, BinaryLinear) and module is not link.layer:
            return None if module.in_features == width else f"{name!r} takes {module.in_features} features, not {width}"
        if id(module) in twice:
            return f"{name!r} is used elsewhere in the model"
        if module is link.layer:
            continue
        reason = _why_not_step(name, module, width)
        if reason is not None:
            return reason
        link.steps.append((name, module))
    return "no binary layer follows it"


def _why_not_step(name: str, module: Any, width: int) -> str | None:
    if type(module) in ELEMENTWISE:
        return None
    if type(module) not in NORMS:
        return f"{name!r} behind it is a {type(module).__name__}"
    if module.running_mean is None:
        return f"{name!r} keeps no running statistics"
    if module.num_features != width:
        return f"{name!r} has {module.num_features} channels, not {width}"
    if any(t.dtype != torch.float32 for t in (*module.parameters(), module.running_mean, module.running_var)):
        return f"{name!r} is not of float32"
    return None


def _fold(link: Link, found: dict[str, BinaryThresholdLinear]) -> str | None:
    """Adds the layer that takes the link's place; or the reason why there is none."""
    layer = link.layer
    threshold, inverted, steps = integer_thresholds(layer, [module for _, module in link.steps])
    if not steps.all():
        channel = int((~steps).nonzero()[0])
        return f"the sign of channel {channel} is not a step of its dot product"
    folded = BinaryThresholdLinear(layer.in_features, layer.out_features, config=layer.config)
    every_bit = kk.pack_signs(-torch.ones(1, layer.in_features))
    folded.weight_bits = torch.where(inverted[:, None], layer.weight_bits ^ every_bit, layer.weight_bits)
    folded.threshold = threshold
    found[link.name] = folded
    return None


@torch.no_grad()
def integer_thresholds(layer: BinaryLinear, modules: list[nn.Module]) -> tuple[Tensor, Tensor, Tensor]:
    """What layer and modules, in eval mode, make of every possible dot product, as a comparison.

    Args:
        modules: what is between the layer and the next sign, each channel for itself.

    Returns:
        Of each output channel, `[N]`: threshold, int32; inverted, bool: whether the weight's signs are to be inverted
        first; and, bool, whether the result's sign is a step at all. Then the result is negative where
        `dot < threshold`, dot of the (inverted) signs.
    """
    k, n = layer.in_features, layer.out_features
    modules = [copy.deepcopy(module).eval() for module in modules]
    # The layer's own arithmetic on weights of +1: inputs of c times -1 then have the dot product k - 2 c.
    plus = BinaryLinear(k, n, layer.bias is not None)
    plus.weight_scale, plus.bias = layer.weight_scale, layer.bias
    negative, changes = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    first = before = torch.zeros(n, dtype=torch.bool)
    for start in range(0, k + 1, BLOCK):
        counts = torch.arange(start, min(start + BLOCK, k + 1))
        y = plus(kk.pack_signs(torch.where(torch.arange(k) < counts[:, None], -1.0, 1.0)))
        for module in modules:
            y = module(y)
        below = y < 0  # as a sign is taken: 0 and NaN are +1
        if start == 0:
            first = before = below[0]
        negative += below.sum(0)
        changes += (below != torch.cat([before[None], below[:-1]])).sum(0)
        before = below[-1]
    # Negative are the `negative` smallest dot products, -k, -k + 2, ..., or, inverted, the largest.
    return (2 * negative - k - 1).to(torch.int32), first & ~before, changes <= 1
