"""Activations that a quantized linear layer computes in its kernel, before the result is first written.

An activation is fused only where the model's own structure says that it follows the layer and nothing else: in an
nn.Sequential, and in an nn.TransformerEncoderLayer between `linear1` and `linear2`. An nn.Identity takes its place, so
that indices, names and state dicts stay as they were. One that stands between the two already, as where a batch norm
was folded, is looked through.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kdq.layers.base import ACTIVATION_FUNCTIONS, ACTIVATION_MODULES

FUNCTIONS = [*((function, name) for name, function in ACTIVATION_FUNCTIONS.items()), (torch.relu, "relu")]
MODULES = {cls: name for name, cls in ACTIVATION_MODULES.items()}


@dataclass(frozen=True)
class Fusion:
    """An activation, by the kernels' name, and where it is: the attribute `key` of `parent`."""

    activation: str
    parent: nn.Module
    key: str

    def take_out(self) -> None:
        """Puts an nn.Identity in the activation's place."""
        setattr(self.parent, self.key, nn.Identity().train(self.parent.training))


def find_fusions(model: nn.Module, names: Iterable[str]) -> dict[str, Fusion]:
    """Of the named linear layers those that an activation of the kernels follows directly, and that activation.

    Left out are layers that the model holds in two places, of which perhaps only one has an activation behind it, and
    activations that are watched or changed (`has_own_code`).
    """
    places: dict[int, set[tuple[int, str]]] = {}
    for parent in model.modules():
        for key, module in parent._modules.items():  # named_children leaves out what came before
            places.setdefault(id(module), set()).add((id(parent), key))
    found = {}
    for name in names:
        parent_name, _, key = name.rpartition(".")
        linear, parent = model.get_submodule(name), model.get_submodule(parent_name)
        fusion = _following(parent, key)
        if fusion is not None and len(places[id(linear)]) == 1:
            found[name] = fusion
    return found


def _following(parent: nn.Module, key: str) -> Fusion | None:
    """The activation that the parent applies to the result of its child `key`, and to that alone."""
    after = None
    if plain_sequential(parent):
        names = list(parent._modules)
        behind = names[names.index(key) + 1 :]
        after = next((name for name in behind if not does_nothing(parent._modules[name])), None)
    elif isinstance(parent, nn.TransformerEncoderLayer) and key == "linear1":
        own = _has_code_of(parent, nn.TransformerEncoderLayer, "forward", "_ff_block")
        after = "activation" if own else None
    activation = None if after is None else _name_in_kernels(getattr(parent, after))
    return None if after is None or activation is None else Fusion(activation, parent, after)


def plain_sequential(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, and does nothing else."""
    return isinstance(module, nn.Sequential) and _has_code_of(module, nn.Sequential, "forward", "__iter__")


def does_nothing(module: nn.Module | None) -> bool:
    return type(module) is nn.Identity and not has_own_code(module)


def _name_in_kernels(activation: Any) -> str | None:
    """None if the kernels do not compute this function; their GELU is the erf form."""
    if not isinstance(activation, nn.Module):
        return next((name for function, name in FUNCTIONS if function is activation), None)
    if has_own_code(activation):
        return None
    if isinstance(activation, nn.GELU) and activation.approximate != "none":
        return None
    return MODULES.get(type(activation))


def _has_code_of(module: nn.Module, cls: type[nn.Module], *methods: str) -> bool:
    """Whether neither a subclass nor the object overrides these methods."""
    return all(getattr(type(module), m) is getattr(cls, m) and m not in vars(module) for m in methods)


def has_own_code(module: nn.Module) -> bool:
    """Whether this one module does something beside what its class does: by hooks, or by a forward that was put in."""
    watched = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(watched) or "forward" in module.__dict__
