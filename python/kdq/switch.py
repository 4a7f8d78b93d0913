"""Which precision a switchable model computes at: for all layers, or a plan that gives each layer its own.

prepare_switchable_(student, [Int8Dynamic(), LowBit(weight_bits=4, act_bits=4), Binary()])
SwitchableDistiller(teacher, student, [SoftTargets(T=4)]).fit(loader, epochs=20)
set_precision_(student, {"encoder.*": Binary(), "head": Int8Dynamic()})
small = extract(student, Binary())
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from kdq.configs import Config, ConfigMap, ExactConfigs, LayerConfigs, assign, normalize
from kdq.layers.switchable import Switchable, SwitchableLinear, SwitchableNorm
from kdq.quantize import convert_


def set_precision_(model: nn.Module, precision: ConfigMap) -> None:
    """Sets the active precision of a switchable model, in place. Parameters are neither added nor removed.

    A norm takes the precision of the linear layer that follows it in the smallest enclosing module that has linear
    layers, by the order of `named_modules()`; if none follows there, of the last one before it. In a mixed plan a batch
    norm may so meet inputs that it was not trained on: train on for a little (an ordinary `Distiller` trains what is
    active), or re-estimate its statistics, `torch.optim.swa_utils.update_bn(loader, kdq.extract(model, plan))`.

    Args:
        model: after `prepare_switchable_`.
        precision: one of `precisions(model)` for all layers, or a mapping of layer names or patterns (fnmatch) to
            them. A layer's exact name counts before patterns, and of these the first that matches, as in `quantize_`;
            a layer that nothing matches keeps its precision. One that is used under several names has one precision.

    Raises:
        TypeError: precision is not a config of kdq's.
        ValueError: the model has no switchable layers, a name or pattern matches none of them, or a layer lacks the
            precision. Nothing is changed.
    """
    layers = _layers(model)
    switches = {name: module for name, module in model.named_modules() if isinstance(module, Switchable)}
    if isinstance(precision, Mapping):
        chosen = _chosen(layers, _by_first_name(model, precision))
        norms = [name for name, module in switches.items() if isinstance(module, SwitchableNorm)]
        chosen |= {norm: chosen[_layer_beside(norm, list(switches), layers)] for norm in norms}
    else:
        chosen = dict.fromkeys(switches, normalize(precision))
    for name, module in switches.items():
        if chosen[name] not in module.precisions:
            has = ", ".join(map(str, module.precisions))
            raise ValueError(f"precision: {name!r} has {has}, but not {chosen[name]}; nothing was changed")
    for name, module in switches.items():
        module.config = chosen[name]


def precisions(model: nn.Module) -> tuple[Config, ...]:
    """The precisions that all switchable layers of a model have, from the widest to the narrowest.

    Raises:
        ValueError: it has no switchable layers, or they have none in common.
    """
    first, *others = _layers(model).values()
    common = tuple(config for config in first.precisions if all(config in layer.precisions for layer in others))
    if not common:
        raise ValueError("model: its switchable layers have no precision in common")
    return common


def precision_of(model: nn.Module) -> dict[str, Config]:
    """The precision in force, by name of the switchable linear layers: a plan that `set_precision_` takes.

    Raises:
        ValueError: there are no switchable layers.
    """
    return {name: layer.config for name, layer in _layers(model).items()}


def extract(model: nn.Module, precision: ConfigMap) -> nn.Module:
    """A copy of a switchable model, converted to the inference layers of one precision or plan. The model stays.

    Raises:
        TypeError, ValueError: as for `set_precision_`.
        RuntimeError: an activation scale of that precision was never initialized, because no batch went through.
    """
    extracted = copy.deepcopy(model)
    set_precision_(extracted, precision)
    convert_(extracted)
    return extracted


def float_copy(model: nn.Module) -> nn.Module:
    """A copy of a switchable model in float: plain linear layers and, as they now are, plain norms."""
    copied = copy.deepcopy(model)
    plain: dict[nn.Module, nn.Module] = {}  # one for a module that has several names
    for name, module in list(copied.named_modules(remove_duplicate=False)):
        if isinstance(module, SwitchableLinear | SwitchableNorm):
            if module not in plain:
                plain[module] = module.to_float() if isinstance(module, SwitchableLinear) else module.to_inference()
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, plain[module])
    return copied


@contextmanager
def keeping_precision(model: nn.Module) -> Iterator[None]:
    """Gives the present precision back on exit."""
    before = [(module, module.config) for module in model.modules() if isinstance(module, Switchable)]
    try:
        yield
    finally:
        for module, config in before:
            module.config = config


def _layers(model: nn.Module) -> dict[str, SwitchableLinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SwitchableLinear)}
    if not layers:
        raise ValueError("model: it has no switchable layers; call prepare_switchable_ first")
    return layers


def _by_first_name(model: nn.Module, precision: Mapping[str, Config]) -> Mapping[str, Config]:
    """The mapping with each further name of a shared layer replaced by its first, which alone `_layers` knows."""
    first: dict[nn.Module, str] = {}
    names = {name: first.setdefault(module, name) for name, module in model.named_modules(remove_duplicate=False)}
    renamed: dict[str, Config] = ExactConfigs() if isinstance(precision, LayerConfigs) else {}
    for name, config in precision.items():
        known = names.get(name, name)
        if renamed.setdefault(known, config) != config:
            raise ValueError(f"precision: {known!r} and {name!r} are one layer, but get {renamed[known]} and {config}")
    return renamed


def _chosen(layers: Mapping[str, SwitchableLinear], precision: Mapping[str, Config]) -> dict[str, Config]:
    """The precision of every layer: that of the plan, or its present one."""
    found = assign(precision, layers, "precision")
    return {name: found[name] or layer.config for name, layer in layers.items()}


def _layer_beside(norm: str, order: list[str], layers: Mapping[str, SwitchableLinear]) -> str:
    """The linear layer whose precision a norm takes, by the rule in `set_precision_`; order: all switchable modules."""
    at = order.index(norm)
    before = [name for name in order[:at] if name in layers]
    after = [name for name in order[at:] if name in layers]
    scope = norm
    while scope:
        scope = scope.rpartition(".")[0]
        prefix = f"{scope}." if scope else ""
        for name in (*after, *reversed(before)):
            if name.startswith(prefix):
                return name
    raise AssertionError("the model has linear layers, as was checked before")
