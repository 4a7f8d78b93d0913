"""quantize_, prepare_qat_, prepare_switchable_, convert_: replace a model's layers, in place and all or nothing.

Each says what becomes of which layer; `kdq.planning` decides and replaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from kdq.binary_inputs import warn_behind_relu
from kdq.calibrate import observe_inputs
from kdq.configs import Binary, Codebook, Config, ConfigMap, Int8Dynamic, Int8Static, LowBit, normalize
from kdq.layers.base import InferenceLayer
from kdq.layers.binary_linear import BinaryLinear
from kdq.layers.codebook_linear import CodebookLinear
from kdq.layers.codebook_qat import CodebookQATLinear
from kdq.layers.conv2d import BinaryConv2d, Int8Conv2d, LowBitConv2d
from kdq.layers.embedding import QATEmbedding, QuantizedEmbedding
from kdq.layers.int8_linear import Int8Linear
from kdq.layers.low_bit_linear import LowBitLinear
from kdq.layers.pruned import PrunedLinear, plain_linear
from kdq.layers.qat import (
    BinaryQATConv2d,
    BinaryQATLinear,
    Int8QATConv2d,
    Int8QATLinear,
    LowBitQATConv2d,
    LowBitQATLinear,
    TrainingTwin,
)
from kdq.layers.qat_methods import DoReFaQATConv2d, DoReFaQATLinear, PACTQATConv2d, PACTQATLinear
from kdq.layers.switchable import Switchable, SwitchableLinear, SwitchableNorm
from kdq.observers import DEFAULT_OBSERVER, Observer, ObserverState, check_observer
from kdq.planning import (
    NO_PATTERN,
    ConversionReport,
    FilterFn,
    LayerPlan,
    Target,
    plan_layers,
    why_not_for,
    why_not_layer,
    why_not_linear,
)

SWITCHABLE_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)


def quantize_(
    model: nn.Module,
    config: ConfigMap,
    filter_fn: FilterFn | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    observer: Observer = DEFAULT_OBSERVER,
    fuse_activations: bool = True,
) -> ConversionReport:
    """Quantizes a trained model in place: its linear layers and 2d convolutions run on the integer and binary kernels
    from now on.

    One config for all is for these. A mapping takes embeddings too, where a pattern matches their names:
    `{"tokens": Int8WeightOnly(), "*": Int8Dynamic()}`. Of a config they take the bits of the weights.

    Convolutions are those of one group, padded with zeros; `Int8WeightOnly` and `Codebook` leave them. `Int8Dynamic`
    gives their activations one scale an image.

    An activation that the model's structure puts directly behind a layer of int8 or few bits (nn.ReLU, nn.SiLU, or
    nn.GELU in its erf form, inside an nn.Sequential; that of an nn.TransformerEncoderLayer) moves into the layer, and
    an nn.Identity takes its place. The model's function stays the same, to float rounding. Who reads the output of that
    layer alone, by a hook set later or by indexing the nn.Sequential, sees it after the activation.

    Args:
        model: any module that contains nn.Linear, nn.Conv2d or nn.Embedding layers. Linear ones that `prune_` has
            pruned keep their zeros where 0 is a value of the scheme (not in 1 bit and DoReFa's odd levels).
        config: one config for all linear layers and convolutions, or a mapping of layer names or patterns (fnmatch) to
            configs for these and embeddings. A layer's exact name counts before patterns, and of these the first that
            matches. One that has several names needs a match at one of them.
        filter_fn: `filter_fn(module, name)`; only layers for which it is true are changed.
        calibration: batches (tensors, `(inputs, ...)` tuples or dicts of keyword arguments), needed where linear
            layers or convolutions get `Int8Static` or `LowBit`, whose activation scales are fixed.
        observer: how these scales follow from what the batches show (`kdq.observers`).
        fuse_activations: False leaves every activation where it is.

    Warns (UserWarning) of a Binary layer that has a ReLU or the like right before it, as far as nn.Sequentials tell:
    all signs that it sees are equal.

    Returns:
        What was changed and fused, and what was left and why. Layers that have hooks are left: the new layer would not
        have them.

    Raises:
        TypeError: config or observer is not one of kdq's.
        ValueError: calibration is missing or empty, a name or pattern matches no layer (one that is left, as a norm,
            counts), a config's method is one of training, a weight is not finite, a layer that has several names would
            get several configs or pass filter_fn at some of them alone, or the model itself is the only layer.
    """
    plan = plan_layers(model, config, filter_fn, why_not_for(config))
    static = {name: p.module for name, p in plan.chosen.items() if fixes_input_scale(p)}
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
    warn_behind_relu(model, [name for name, p in plan.chosen.items() if sees_signs(p)])
    return plan.carry_out(
        model, lambda name, p: inference_layer(p.module, p.config, observers.get(name)), fuse_activations
    )


def prepare_qat_(model: nn.Module, config: ConfigMap, filter_fn: FilterFn | None = None) -> ConversionReport:
    """Replaces layers by their training twins, in place: float weights, fake-quantized in the forward pass.

    Train the model as before (make the optimizer after this call: learned scales are parameters), then call `convert_`.
    Arguments, report and errors as for `quantize_`; nothing needs calibration, activation scales start from the first
    batch, and if that has no negative value, a Binary layer warns (UserWarning). Of pruned layers, a `Codebook` keeps
    the zeros in training; other schemes may train them away.
    """
    plan = plan_layers(model, config, filter_fn, why_not_for(config))
    return plan.carry_out(model, lambda name, p: training_twin(p.module, p.config, name))


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
        ValueError: there are fewer than two, two are equal, one is a Codebook, or only norms would change; or as for
            `quantize_`.
    """
    if isinstance(precisions, str) or not isinstance(precisions, Sequence):
        raise TypeError(f"precisions: expected a list of configs, got {precisions!r}")
    configs = tuple(normalize(config) for config in precisions)
    if len(configs) < 2 or len(set(configs)) < len(configs):
        raise ValueError(f"precisions: expected at least two different ones, got {list(precisions)}")
    if any(isinstance(config, Codebook) for config in configs):
        raise ValueError("precisions: a Codebook trains its values, and has no float weight to share with others")
    plan = plan_layers(model, configs[0], filter_fn, _why_not_switchable, role="precisions")
    linear_chosen = any(isinstance(target.module, nn.Linear) for target in plan.chosen.values())
    linear_there = any(isinstance(module, SwitchableLinear) for module in model.modules())
    if plan.chosen and not (linear_chosen or linear_there):
        raise ValueError("model: no linear layer of it becomes switchable, and its norms alone have nothing to follow")

    def build(name: str, p: Target) -> Switchable:
        if isinstance(p.module, nn.Linear):
            return SwitchableLinear(p.module, {config: training_twin(p.module, config, name) for config in configs})
        return SwitchableNorm(p.module, configs)

    return plan.carry_out(model, build)


def convert_(
    model: nn.Module, plan: Mapping[str, Config] | None = None, *, fuse_activations: bool = True
) -> ConversionReport:
    """Replaces training twins by the layers that run on the real kernels, in place; of switchable layers and norms
    their active precision; pruned layers by plain ones with zeros.

    Args:
        model: after `prepare_qat_` or `prepare_switchable_` and training.
        plan: also quantizes plain nn.Linear, nn.Conv2d and nn.Embedding layers, by name or pattern, as `quantize_` does
            without calibration.
        fuse_activations: as for `quantize_`.

    Raises:
        RuntimeError: an activation scale was never initialized, because no batch went through.
        ValueError: as for `quantize_`, or a training twin has hooks.
    """

    def why_not(module: nn.Module) -> str | None:
        return None if isinstance(module, TrainingTwin | SwitchableNorm) else "not prepared by prepare_qat_"

    prepared = plan_layers(model, {}, None, why_not, config_of=lambda module: module.config)
    planned = LayerPlan()
    if plan is not None:
        planned = plan_layers(model, plan, None, why_not_layer, role="plan")
        for name, target in planned.chosen.items():
            if fixes_input_scale(target):
                raise ValueError(
                    f"plan: {name!r} gets {target.config}, which fixes the activations' scale: "
                    "train it with prepare_qat_ or calibrate it with quantize_"
                )
        warn_behind_relu(model, [name for name, p in planned.chosen.items() if sees_signs(p)])
        prepared.chosen.update(planned.chosen)
        wanted = {name: why for name, why in planned.left.items() if why != NO_PATTERN}
        left = {name: wanted.get(name, why) for name, why in prepared.left.items()}
        prepared.left = {name: why for name, why in left.items() if name not in planned.chosen}

    def build(name: str, p: Target) -> nn.Module:
        if name in planned.chosen:
            return inference_layer(p.module, p.config, None)
        layer: nn.Module = p.module.to_inference()
        return layer

    return prepared.carry_out(model, build, fuse_activations)


# ---- one layer -------------------------------------------------------------------------------------------------------


def fixes_input_scale(target: Target) -> bool:
    """Whether the layer's activations get a scale that calibration or training has to find."""
    return _has_activations(target) and isinstance(target.config, Int8Static | LowBit)


def sees_signs(target: Target) -> bool:
    """Whether the layer will see nothing but the signs of its inputs."""
    return _has_activations(target) and isinstance(target.config, Binary)


def _has_activations(target: Target) -> bool:
    """Embeddings have none."""
    return isinstance(target.module, nn.Linear | PrunedLinear | nn.Conv2d)


def inference_layer(layer: Any, config: Config, observer: ObserverState | None) -> InferenceLayer:
    """What `quantize_` puts in the place of an nn.Linear, nn.Conv2d or nn.Embedding; observer is needed where the
    config fixes the scale."""
    if isinstance(layer, nn.Embedding):
        return QuantizedEmbedding.from_float(layer, config)
    conv = isinstance(layer, nn.Conv2d)
    layer = plain_linear(layer)
    if isinstance(config, Codebook):
        return CodebookLinear.from_float(layer, config)
    if isinstance(config, Binary):
        return (BinaryConv2d if conv else BinaryLinear).from_float(layer, config)
    if isinstance(config, LowBit):
        assert observer is not None
        low_bit = LowBitConv2d if conv else LowBitLinear
        return low_bit.from_float(layer, config, input_grid=observer.grid(config.act_bits))
    grid = observer.grid(8) if observer is not None else None
    return (Int8Conv2d if conv else Int8Linear).from_float(layer, config, input_grid=grid)


def training_twin(layer: Any, config: Config, name: str = "") -> Any:
    """What `prepare_qat_` puts in the place of an nn.Linear, nn.Conv2d (a `QATProduct`) or nn.Embedding of that name,
    which its warnings tell."""
    if isinstance(layer, nn.Embedding):
        return QATEmbedding(layer, config)
    conv = isinstance(layer, nn.Conv2d)
    layer = plain_linear(layer)
    if isinstance(config, Codebook):
        return CodebookQATLinear(layer, config)
    if isinstance(config, Binary):
        return (BinaryQATConv2d if conv else BinaryQATLinear)(layer, config, name)
    if not isinstance(config, LowBit):
        return (Int8QATConv2d if conv else Int8QATLinear)(layer, config)
    if config.method == "pact":
        return (PACTQATConv2d if conv else PACTQATLinear)(layer, config)
    if config.method == "dorefa":
        return (DoReFaQATConv2d if conv else DoReFaQATLinear)(layer, config)
    return (LowBitQATConv2d if conv else LowBitQATLinear)(layer, config)


def _why_not_switchable(module: nn.Module) -> str | None:
    """The reason why a module cannot be made switchable; None if it can."""
    if isinstance(module, SwitchableNorm):
        return "already switchable"
    if type(module) in SWITCHABLE_NORMS:
        return None
    return why_not_linear(module)


def check_post_training(plan: LayerPlan) -> None:
    """Raises ValueError if a config's method is one of training."""
    for name, target in plan.chosen.items():
        if isinstance(target.config, LowBit) and target.config.method != "lsq":
            raise ValueError(
                f"config: {name!r} gets {target.config}, which has to be trained: use prepare_qat_, or method='lsq'"
            )


def quantizable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that `quantize_` replaces when one config is given for all, by name; a shared one under each.
    Those that precisions are searched for: convolutions are not among them.

    Raises:
        ValueError: as for `quantize_`.
    """
    return {name: t.module for name, t in plan_layers(model, Int8Dynamic(), None, why_not_linear).chosen.items()}
