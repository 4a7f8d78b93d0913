"""Which layers follow each other: the neighbours that nn.Sequential makes certain, and layers rewritten all at once.

Only a plain nn.Sequential says in its structure who reads whose output. In a module with a forward of its own, the same
children may be added, concatenated or called twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Named = tuple[str, nn.Module]


def chains(model: nn.Module) -> Iterator[list[Named]]:
    """The modules of each outermost nn.Sequential in the order they run, nested ones in line."""

    def flat(sequence: nn.Module, name: str) -> Iterator[Named]:
        for key, child in sequence._modules.items():  # named_children leaves out what was there before
            assert child is not None
            full = f"{name}.{key}" if name else key
            if type(child) is nn.Sequential:
                yield from flat(child, full)
            else:
                yield full, child

    inner = {
        id(child)
        for module in model.modules()
        if type(module) is nn.Sequential
        for child in module.children()
        if type(child) is nn.Sequential
    }
    for name, module in model.named_modules():
        if type(module) is nn.Sequential and id(module) not in inner:
            yield list(flat(module, name))


def convolutions(model: nn.Module) -> list[Named]:
    """For the reports of tools for linear layers."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def used_twice(model: nn.Module) -> set[int]:
    """The ids of modules that have several names, or share a parameter with another: rewriting one changes both."""
    modules = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        id(module)
        for module in model.modules()
        if modules[id(module)] > 1 or any(owners[id(p)] > 1 for p in module.parameters(recurse=False))
    }


def why_not_float(module: nn.Module, kinds: tuple[type[nn.Module], ...], twice: set[int]) -> str | None:
    """Why a layer's weight must not be rewritten; None if it may."""
    if type(module) not in kinds:
        return f"{type(module).__name__} is none of {', '.join(kind.__name__ for kind in kinds)}"
    if parametrize.is_parametrized(module):
        return f"the weight of the {type(module).__name__} is parametrized"
    if id(module) in twice:
        return f"the {type(module).__name__} is used or shares its parameters elsewhere in the model"
    return None


class Rewrites:
    """New weights and biases for layers, in float64, put in place all at once: an error on the way changes nothing."""

    def __init__(self) -> None:
        self._new: dict[int, tuple[Any, Tensor, Tensor | None]] = {}

    def of(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a layer as they will be."""
        module: Any = layer
        if id(layer) not in self._new:
            bias = None if module.bias is None else module.bias.detach().double()
            return module.weight.detach().double(), bias
        return self._new[id(layer)][1:]

    def set(self, layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        self._new[id(layer)] = (layer, weight, bias)

    def scale_outputs(self, layer: nn.Module, factor: Tensor) -> None:
        """Output channel i times factor[i]."""
        weight, bias = self.of(layer)
        shape = [-1, *[1] * (weight.dim() - 1)]
        self.set(layer, weight * factor.view(shape), None if bias is None else bias * factor)

    def scale_inputs(self, linear: nn.Module, factor: Tensor) -> None:
        """Column j of a linear layer's weight times factor[j]."""
        weight, bias = self.of(linear)
        self.set(linear, weight * factor, bias)

    def carry_out(self, names: dict[int, str]) -> None:
        """Writes all, in each parameter's dtype.

        Raises:
            ValueError: a new value is NaN, infinite, or beyond the dtype; nothing was changed.
        """
        for key, (layer, weight, bias) in self._new.items():
            for value in (weight, bias):
                if value is not None and not torch.isfinite(value.to(layer.weight.dtype)).all():
                    raise ValueError(f"{names.get(key, type(layer).__name__)}: its new values would be NaN or infinite")
        with torch.no_grad():
            for layer, weight, bias in self._new.values():
                layer.weight.copy_(weight)
                if bias is None:
                    continue
                if layer.bias is None:
                    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
                else:
                    layer.bias.copy_(bias)


def names_of(model: nn.Module) -> dict[int, str]:
    """The name of each module, by id, for messages."""
    return {id(module): name for name, module in model.named_modules()}
