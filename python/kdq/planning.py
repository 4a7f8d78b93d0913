"""What a call does to a model: which layers it replaces and why it leaves the others, and putting the new ones in.

`plan_layers` decides about every layer, `LayerPlan.carry_out` first builds all replacements and only then touches the
model: an error on the way leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils import parametrize

from kdq.configs import Config, ConfigMap, Pruned, assign
from kdq.distributed import check_plain
from kdq.fuse import find_fusions, has_own_code
from kdq.layers.base import InferenceLayer, InferenceProduct
from kdq.layers.embedding import why_not_embedding
from kdq.layers.geometry import why_not_conv_config, why_not_geometry
from kdq.layers.pruned import PrunedLinear
from kdq.layers.qat import QATConv2d, TrainingTwin
from kdq.layers.switchable import SwitchableNorm
from kdq.transformer import run_layers_of_transformers

FilterFn = Callable[[nn.Module, str], bool]
NO_PATTERN = "no pattern of the config matches its name"


@dataclass(frozen=True)
class ConversionReport:
    """What a call did with every leaf module that has weights, and with every nn.MultiheadAttention, which has some
    beside its child: changed (name -> config) or left (name -> reason).

    fused: the changed layers that compute the activation behind them too (name -> "relu", "gelu" or "silu").
    """

    changed: dict[str, Config | Pruned] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)

    def __rich__(self) -> Table:
        fused = f"{len(self.fused)} with their activation, " if self.fused else ""
        table = Table("module", "result", title=f"{len(self.changed)} changed, {fused}{len(self.left)} left")
        for name, config in self.changed.items():
            activation = f" + {self.fused[name]}" if name in self.fused else ""
            table.add_row(name, f"{config}{activation}", style="bold")
        for name, reason in self.left.items():
            table.add_row(name or "(the model)", f"left: {reason}")
        return table

    def __str__(self) -> str:
        console = Console(width=110)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


@dataclass
class Target:
    """A module to replace, and what it becomes."""

    module: Any
    config: Any  # a Config; of a layer that is pruned, Pruned


@dataclass
class LayerPlan:
    """Every leaf module with weights: chosen (name -> target) or left (name -> reason)."""

    chosen: dict[str, Target] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def carry_out(
        self, model: nn.Module, build: Callable[[str, Target], nn.Module], fuse_activations: bool = False
    ) -> ConversionReport:
        """Builds every replacement, then puts them in. A module that is used under two names is built once."""
        built: dict[int, nn.Module] = {}
        for name, target in self.chosen.items():
            if id(target.module) in built:
                continue
            try:
                layer = build(name, target)
            except (ValueError, RuntimeError) as error:
                raise type(error)(f"{name}: {error}") from error
            built[id(target.module)] = layer.train(target.module.training)
        able = [n for n, t in self.chosen.items() if getattr(built[id(t.module)], "computes_activation", False)]
        fusions = find_fusions(model, able) if fuse_activations else {}
        for name, fusion in fusions.items():
            cast(InferenceProduct, built[id(self.chosen[name].module)]).activation = fusion.activation
            fusion.take_out()
        for name, target in self.chosen.items():
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, built[id(target.module)])
        run_layers_of_transformers(model)
        return ConversionReport(
            {n: t.config for n, t in self.chosen.items()}, self.left, {n: f.activation for n, f in fusions.items()}
        )


def plan_layers(
    model: nn.Module,
    configs: ConfigMap,
    filter_fn: FilterFn | None,
    why_not: Callable[[nn.Module], str | None],
    config_of: Callable[[Any], Config | Pruned] | None = None,
    role: str = "config",
) -> LayerPlan:
    """Decides about every leaf module. One that has several names gets what any of them gets, at all of them.

    Args:
        configs, filter_fn: as for `quantize_`.
        why_not: the reason why a module cannot be replaced; None if it can.
        config_of: overrides configs: the module says what it becomes.
        role: the caller's name of configs, for messages.

    Raises:
        TypeError: configs are not kdq's.
        ValueError: the model itself is the only layer or wrapped by DDP or FSDP2, a weight is not finite or not on the
            CPU, a training twin has hooks, a name or pattern of configs matches no layer, or a layer that has several
            names would get several configs, or filter_fn takes it at some of them alone.
    """
    check_plain(model)
    plan = LayerPlan()
    modules = model.named_modules(remove_duplicate=False)
    leaves = {name: module for name, module in modules if _is_leaf(module) and not _inside_layer(model, name)}
    layers = [name for name, module in leaves.items() if _has_tensors(module)]
    by_name = _at_all_names(assign(configs, layers, role), leaves) if config_of is None else {}
    for name, module in leaves.items():
        reason = why_not(module)
        config: Config | Pruned | None = None
        if reason is None:
            config = config_of(module) if config_of is not None else by_name.get(name)
            if config is None:
                reason = NO_PATTERN
            elif filter_fn is not None and not filter_fn(module, name):
                reason = "filter_fn is false"
            elif isinstance(module, nn.Conv2d | QATConv2d) and (why := why_not_conv_config(config)):
                reason = why
            elif has_own_code(module):
                reason = "it has hooks or a forward of its own, which a new layer would lack; remove them first"
                if isinstance(module, TrainingTwin | SwitchableNorm):  # a twin that stays a twin would go unnoticed
                    raise ValueError(f"{name}: {reason}")
        if reason is not None or config is None:
            if name in layers:
                plan.left[name] = reason or ""
            continue
        if name == "":
            raise ValueError(
                f"model: the model itself is a {type(module).__name__}, which cannot be replaced in place; wrap it, "
                "as in nn.Sequential(model)"
            )
        if isinstance(module, nn.Linear | PrunedLinear | nn.Conv2d | nn.Embedding):
            _check_weight(name, module)
        plan.chosen[name] = Target(module, config)
    _check_shared(plan, leaves, role)
    return plan


def _at_all_names(by_name: dict[str, Config | None], leaves: Mapping[str, nn.Module]) -> dict[str, Config | None]:
    """Gives the config of a layer that is named at one of several places to its other names that have none."""
    given: dict[int, Config] = {}
    for name, config in by_name.items():
        if config is not None:
            given.setdefault(id(leaves[name]), config)
    return {name: config or given.get(id(leaves[name])) for name, config in by_name.items()}


def _check_shared(plan: LayerPlan, leaves: Mapping[str, nn.Module], role: str) -> None:
    """A layer that has several names is built once: raises ValueError if these have different configs, or if some of
    them are left, which is by filter_fn: all other reasons are the layer's own."""
    first: dict[int, str] = {}
    for name, target in plan.chosen.items():
        before = first.setdefault(id(target.module), name)
        if plan.chosen[before].config != target.config:
            raise ValueError(
                f"{role}: {before!r} and {name!r} are one layer, but get {plan.chosen[before].config} and "
                f"{target.config}"
            )
    for name in plan.left:
        chosen = first.get(id(leaves[name]))
        if chosen is not None:
            raise ValueError(
                f"filter_fn: {chosen!r} and {name!r} are one layer, but it is true of the first name alone"
            )


def _is_leaf(module: nn.Module) -> bool:
    layers = nn.Linear | nn.Conv2d | TrainingTwin | SwitchableNorm | InferenceLayer
    # An nn.MultiheadAttention has parameters beside its one child.
    return isinstance(module, layers | nn.MultiheadAttention) or next(module.children(), None) is None


def _has_tensors(module: nn.Module) -> bool:
    return any(next(tensors, None) is not None for tensors in (module.parameters(), module.buffers()))


def _inside_layer(model: nn.Module, name: str) -> bool:
    """Whether a module is a part of a layer: the grid of a training twin, the parametrization of a weight."""
    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)) if name)
    return any(isinstance(module, nn.Linear | nn.Conv2d | TrainingTwin | SwitchableNorm) for module in above)


def why_not_for(configs: ConfigMap) -> Callable[[nn.Module], str | None]:
    """The reasons why `quantize_` and `prepare_qat_` leave modules: one config for all is for linear layers and
    convolutions, a mapping takes embeddings too."""
    return why_not_layer if isinstance(configs, Mapping) else why_not_product


def why_not_layer(module: nn.Module) -> str | None:
    """The reason why a linear layer, convolution or embedding cannot be quantized; None if it can."""
    return why_not_embedding(module) if isinstance(module, nn.Embedding) else why_not_product(module)


def why_not_product(module: nn.Module) -> str | None:
    """The reason why a linear layer, pruned or not, or a convolution cannot be quantized; None if it can."""
    return why_not_conv(module) if isinstance(module, nn.Conv2d) else why_not_linear_or_pruned(module)


def why_not_linear_or_pruned(module: nn.Module) -> str | None:
    """As `why_not_linear`, for those who take the weight of a pruned layer with its zeros."""
    return None if isinstance(module, PrunedLinear) else why_not_linear(module)


def why_not_linear(module: nn.Module) -> str | None:
    """The reason why a linear layer cannot be quantized; None if it can."""
    if isinstance(module, PrunedLinear):
        return "it is pruned in training; call convert_ first, which makes its zeros part of the weight"
    if isinstance(module, InferenceLayer | TrainingTwin):
        return f"already quantized ({type(module).__name__})"
    if isinstance(module, nn.Embedding):
        return "an embedding: quantize_ and prepare_qat_ take it where a pattern of the config matches its name"
    if isinstance(module, nn.Conv2d):
        return "a convolution: quantize_ and prepare_qat_ take it, this is for linear layers"
    if isinstance(module, nn.MultiheadAttention):
        return "its input projections are parameters, not layers; call kdq.open_attention_ first"
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} has no quantized form"
    return _why_not_float(module, nn.Linear, module.in_features * module.out_features)


def why_not_conv(module: nn.Conv2d) -> str | None:
    """The reason why a convolution cannot be quantized, by whatever config; None if it can."""
    return _why_not_float(module, nn.Conv2d, module.in_channels * module.out_channels) or why_not_geometry(module)


def _why_not_float(module: Any, kind: type[nn.Module], weights: int) -> str | None:
    """What linear layers and convolutions are left for alike."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads its weight and does not call it; call kdq.open_attention_ first"
    if type(module) is not kind:
        name = f"nn.{kind.__name__}"
        return f"{type(module).__name__} is a subclass of {name}, whose own code might read the float weight"
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {module.weight.dtype}; the kernels take float32, bfloat16 and float16"
    return None if weights else "it has no weights"


def _check_weight(name: str, layer: nn.Linear | PrunedLinear | nn.Conv2d | nn.Embedding) -> None:
    """Conditions that a user must mend: raising beats leaving the layer."""
    if layer.weight.device.type != "cpu":
        raise ValueError(f"{name}: expected its weight on the CPU, got {layer.weight.device}; move the model first")
    for part, tensor in layer.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: its {part} contains NaN or inf; nothing was changed")
