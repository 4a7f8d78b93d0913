"""quantize_, prepare_qat_, prepare_switchable_, convert_: replace a model's layers, in place and all or nothing.

Each call first decides about every layer and activation and builds all replacements; only then does it touch the model.
An error on the way leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils import parametrize

from kdq.calibrate import observe_inputs
from kdq.configs import Binary, Config, ConfigMap, Int8Dynamic, Int8Static, LayerConfigs, LowBit, config_for, normalize
from kdq.fuse import find_fusions
from kdq.layers.base import InferenceLinear, PackedInt8Linear
from kdq.layers.binary_linear import BinaryLinear
from kdq.layers.int8_linear import Int8Linear
from kdq.layers.low_bit_linear import LowBitLinear
from kdq.layers.qat import BinaryQATLinear, Int8QATLinear, LowBitQATLinear, QATLinear
from kdq.layers.qat_methods import DoReFaQATLinear, PACTQATLinear
from kdq.layers.switchable import Switchable, SwitchableLinear, SwitchableNorm
from kdq.observers import DEFAULT_OBSERVER, Observer, ObserverState, check_observer
from kdq.transformer import run_layers_of_transformers

SWITCHABLE_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class ConversionReport:
    """What a call did with every leaf module that has weights: changed (name -> config) or left (name -> reason).

    fused: the changed layers that compute the activation behind them too (name -> "relu", "gelu" or "silu").
    """

    changed: dict[str, Config] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)

    def __rich__(self) -> Table:
        title = f"{len(self.changed)} changed, {len(self.fused)} with their activation, {len(self.left)} left"
        table = Table("module", "result", title=title)
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


def quantize_(
    model: nn.Module,
    config: ConfigMap,
    filter_fn: FilterFn | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    observer: Observer = DEFAULT_OBSERVER,
    fuse_activations: bool = True,
) -> ConversionReport:
    """Quantizes a trained model in place: its linear layers run on the integer and binary kernels from now on.

    An activation that the model's structure puts directly behind a layer of int8 or few bits (nn.ReLU, nn.SiLU, or
    nn.GELU in its erf form, inside an nn.Sequential; that of an nn.TransformerEncoderLayer) moves into the layer, and
    an nn.Identity takes its place. The model's function stays the same, to float rounding. Who reads the output of that
    layer alone, by a hook set later or by indexing the nn.Sequential, sees it after the activation.

    Args:
        model: any module that contains nn.Linear layers.
        config: one config for all layers, or a mapping of name patterns (fnmatch) to configs; the first match counts.
        filter_fn: `filter_fn(module, name)`; only layers for which it is true are changed.
        calibration: batches (tensors, `(inputs, ...)` tuples or dicts of keyword arguments), needed for `Int8Static`
            and `LowBit`, whose activation scales are fixed.
        observer: how these scales follow from what the batches show (`kdq.observers`).
        fuse_activations: False leaves every activation where it is.

    Returns:
        What was changed and fused, and what was left and why.

    Raises:
        TypeError: config or observer is not one of kdq's.
        ValueError: calibration is missing or empty, a config's method is one of training, a weight is not finite, or
            the model itself is the only linear layer.
    """
    plan = _plan(model, config, filter_fn, why_not_linear)
    static = {name: p.module for name, p in plan.chosen.items() if isinstance(p.config, Int8Static | LowBit)}
    check_observer(observer)
    check_post_training(plan)
    observers: dict[str, ObserverState] = {}
    if static:
        if calibration is None:
            first = next(iter(static))
            raise ValueError(
                f"calibration: {first!r} gets {plan.chosen[first].config}, which fixes the activations' scale; "
                "pass some batches as calibration=, or use Int8Dynamic, which needs none"
            )
        observers = observe_inputs(model, static, calibration, observer)
    return plan.carry_out(
        model, lambda name, p: inference_layer(p.module, p.config, observers.get(name)), fuse_activations
    )


def prepare_qat_(model: nn.Module, config: ConfigMap, filter_fn: FilterFn | None = None) -> ConversionReport:
    """Replaces linear layers by their training twins, in place: float weights, fake-quantized in the forward pass.

    Train the model as before (make the optimizer after this call: learned scales are parameters), then call `convert_`.
    Arguments, report and errors as for `quantize_`; nothing needs calibration, activation scales start from the first
    batch.
    """
    plan = _plan(model, config, filter_fn, why_not_linear)
    return plan.carry_out(model, lambda _, p: _training_twin(p.module, p.config))


def prepare_switchable_(
    model: nn.Module, precisions: Sequence[Config], filter_fn: FilterFn | None = None
) -> ConversionReport:
    """Makes a model trainable at several precisions at once, in place: one student for all of them.

    Linear layers keep one float weight for all precisions and get scales and activation grids for each; batch norms
    (1d and 2d) and layer norms get statistics and affine parameters for each. Train it with a `SwitchableDistiller`
    (make the optimizer after this call), choose with `set_precision_`, deploy with `extract` or `convert_`. Layers that
    shall have one precision only: leave them to `prepare_qat_` with filter_fn.

    Args:
        precisions: two or more configs, in any order; the widest is active at first.
        filter_fn: `filter_fn(module, name)`; only linear layers and norms for which it is true are changed.

    Returns:
        What was changed (with the precision that is active), and what was left and why.

    Raises:
        TypeError: precisions is not a sequence of configs.
        ValueError: there are fewer than two, two are equal, or only norms would change; or as for `quantize_`.
    """
    if isinstance(precisions, str) or not isinstance(precisions, Sequence):
        raise TypeError(f"precisions: expected a list of configs, got {precisions!r}")
    configs = tuple(normalize(config) for config in precisions)
    if len(configs) < 2 or len(set(configs)) < len(configs):
        raise ValueError(f"precisions: expected at least two different ones, got {list(precisions)}")
    plan = _plan(model, {"*": configs[0]}, filter_fn, _why_not_switchable)
    linear_chosen = any(isinstance(target.module, nn.Linear) for target in plan.chosen.values())
    linear_there = any(isinstance(module, SwitchableLinear) for module in model.modules())
    if plan.chosen and not (linear_chosen or linear_there):
        raise ValueError("model: no linear layer of it becomes switchable, and its norms alone have nothing to follow")

    def build(_: str, p: _Target) -> Switchable:
        if isinstance(p.module, nn.Linear):
            return SwitchableLinear(p.module, {config: _training_twin(p.module, config) for config in configs})
        return SwitchableNorm(p.module, configs)

    return plan.carry_out(model, build)


def convert_(
    model: nn.Module, plan: Mapping[str, Config] | None = None, *, fuse_activations: bool = True
) -> ConversionReport:
    """Replaces training twins by the layers that run on the real kernels, in place; of switchable layers and norms
    their active precision.

    Args:
        model: after `prepare_qat_` or `prepare_switchable_` and training.
        plan: also quantizes plain nn.Linear layers whose names match, as `quantize_` does without calibration.
        fuse_activations: as for `quantize_`.

    Raises:
        RuntimeError: an activation scale was never initialized, because no batch went through.
        ValueError: as for `quantize_`.
    """

    def why_not(module: nn.Module) -> str | None:
        return None if isinstance(module, QATLinear | SwitchableNorm) else "not prepared by prepare_qat_"

    prepared = _plan(model, {}, None, why_not, config_of=lambda module: module.config)
    if plan is not None:
        planned = _plan(model, plan, None, why_not_linear)
        for name, target in planned.chosen.items():
            if isinstance(target.config, Int8Static | LowBit):
                raise ValueError(
                    f"plan: {name!r} gets {target.config}, which fixes the activations' scale: "
                    "train it with prepare_qat_ or calibrate it with quantize_"
                )
        prepared.chosen.update(planned.chosen)
        prepared.left = {name: why for name, why in prepared.left.items() if name not in planned.chosen}

    def build(_: str, p: _Target) -> nn.Module:
        if isinstance(p.module, QATLinear | SwitchableNorm):
            return p.module.to_inference()
        return inference_layer(p.module, p.config, None)

    return prepared.carry_out(model, build, fuse_activations)


# ---- one layer -------------------------------------------------------------------------------------------------------


def inference_layer(linear: Any, config: Config, observer: ObserverState | None) -> InferenceLinear:
    """The layer that `quantize_` puts in an nn.Linear's place; observer is needed where the config fixes the scale."""
    if isinstance(config, Binary):
        return BinaryLinear.from_float(linear, config)
    if isinstance(config, LowBit):
        assert observer is not None
        return LowBitLinear.from_float(linear, config, input_grid=observer.grid(config.act_bits))
    grid = observer.grid(8) if observer is not None else None
    return Int8Linear.from_float(linear, config, input_grid=grid)


def _training_twin(linear: Any, config: Config) -> QATLinear:
    if isinstance(config, Binary):
        return BinaryQATLinear(linear, config)
    if isinstance(config, LowBit):
        if config.method == "pact":
            return PACTQATLinear(linear, config)
        return DoReFaQATLinear(linear, config) if config.method == "dorefa" else LowBitQATLinear(linear, config)
    return Int8QATLinear(linear, config)


def why_not_linear(module: nn.Module) -> str | None:
    """The reason why a module cannot be quantized; None if it can."""
    if isinstance(module, InferenceLinear | QATLinear):
        return f"already quantized ({type(module).__name__})"
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} has no quantized form"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear, whose own code might read the float weight"
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {module.weight.dtype}; the kernels take float32, bfloat16 and float16"
    if module.in_features == 0 or module.out_features == 0:
        return "it has no weights"
    return None


def _why_not_switchable(module: nn.Module) -> str | None:
    """The reason why a module cannot be made switchable; None if it can."""
    if isinstance(module, SwitchableNorm):
        return "already switchable"
    if type(module) in SWITCHABLE_NORMS:
        return None
    return why_not_linear(module)


def _check_weight(name: str, linear: nn.Linear) -> None:
    """Conditions that a user must mend: raising beats leaving the layer."""
    if linear.weight.device.type != "cpu":
        raise ValueError(f"{name}: expected its weight on the CPU, got {linear.weight.device}; move the model first")
    for part, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: its {part} contains NaN or inf; nothing was changed")


def check_post_training(plan: _Plan) -> None:
    """Raises ValueError if a config's method is one of training."""
    for name, target in plan.chosen.items():
        if isinstance(target.config, LowBit) and target.config.method != "lsq":
            raise ValueError(
                f"config: {name!r} gets {target.config}, which has to be trained: use prepare_qat_, or method='lsq'"
            )


# ---- the whole model -------------------------------------------------------------------------------------------------


@dataclass
class _Target:
    module: Any
    config: Config


@dataclass
class _Plan:
    chosen: dict[str, _Target] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def carry_out(
        self, model: nn.Module, build: Callable[[str, _Target], nn.Module], fuse_activations: bool = False
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
        able = [n for n, t in self.chosen.items() if isinstance(built[id(t.module)], PackedInt8Linear)]
        fusions = find_fusions(model, able) if fuse_activations else {}
        for name, fusion in fusions.items():
            cast(PackedInt8Linear, built[id(self.chosen[name].module)]).activation = fusion.activation
            fusion.take_out()
        for name, target in self.chosen.items():
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, built[id(target.module)])
        run_layers_of_transformers(model)
        return ConversionReport(
            {n: t.config for n, t in self.chosen.items()}, self.left, {n: f.activation for n, f in fusions.items()}
        )


def _plan(
    model: nn.Module,
    configs: ConfigMap,
    filter_fn: FilterFn | None,
    why_not: Callable[[nn.Module], str | None],
    config_of: Callable[[Any], Config] | None = None,
) -> _Plan:
    """Decides about every leaf module. config_of overrides configs: the module says what it becomes."""
    plan = _Plan()
    if config_of is None:
        config_for(configs, "")  # a wrong config is an error even where no layer would get it
    for name, module in model.named_modules(remove_duplicate=False):
        if not _is_leaf(module) or _inside_layer(model, name):
            continue
        reason = why_not(module)
        config = None
        if reason is None:
            config = config_of(module) if config_of is not None else config_for(configs, name)
            if config is None:
                reason = "no pattern of the config matches its name"
            elif filter_fn is not None and not filter_fn(module, name):
                reason = "filter_fn is false"
        if reason is not None or config is None:
            if next(module.parameters(), None) is not None or isinstance(module, InferenceLinear):
                plan.left[name] = reason or ""
            continue
        if name == "":
            raise ValueError(
                f"model: the model itself is a {type(module).__name__}, which cannot be replaced in place; wrap it, "
                "as in nn.Sequential(model)"
            )
        if isinstance(module, nn.Linear):
            _check_weight(name, module)
        plan.chosen[name] = _Target(module, config)
    if isinstance(configs, LayerConfigs):
        names = {name for name, _ in model.named_modules(remove_duplicate=False)}
        if lacking := [name for name in configs if name not in names]:
            raise ValueError(f"plan: it names layers that the model lacks: {', '.join(map(repr, lacking[:5]))}")
    return plan


def quantizable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that `quantize_` replaces when one config is given for all, by name; a shared one under each name.

    Raises:
        ValueError: as for `quantize_`.
    """
    return {name: t.module for name, t in _plan(model, Int8Dynamic(), None, why_not_linear).chosen.items()}


def _is_leaf(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Linear | QATLinear | SwitchableNorm | InferenceLinear)
        or next(module.children(), None) is None
    )


def _inside_layer(model: nn.Module, name: str) -> bool:
    """Whether a module is a part of a layer: the grid of a training twin, the parametrization of a linear layer."""
    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)) if name)
    return any(isinstance(module, nn.Linear | QATLinear | SwitchableNorm) for module in above)
