"""Learned rounding: whether each weight goes to the integer below or above is trained, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.calibrate import observe_inputs, run_batches
from kdq.configs import Binary, Codebook, Config, ConfigMap, Int8Dynamic, Int8Static, LowBit
from kdq.grids import AffineGrid, int8_weight_scale, low_bit_weight_scale, weight_range
from kdq.layers.base import InferenceLinear
from kdq.layers.int8_linear import Int8Linear
from kdq.layers.low_bit_linear import LowBitLinear
from kdq.layers.qat_product import fake_input
from kdq.observers import DEFAULT_OBSERVER, Observer
from kdq.planning import FilterFn, plan_layers, why_not_linear
from kdq.ptq.tool_report import ToolReport
from kdq.quantize import check_post_training
from kdq.transformer import run_layers_of_transformers

ROWS = 4096  # of a layer's inputs, kept to learn from
BATCH = 256
LEARNING_RATE = 1e-2
REGULARIZER = 0.01
WARM_UP = 0.2  # the share of steps without the regularizer
BETA = (20.0, 2.0)
STRETCH = (-0.1, 1.1)  # of the rectified sigmoid (Louizos et al. 2018)


@dataclass(frozen=True)
class _Case:
    """One layer to learn: its integers are `floor + {0, 1}` within the limits; rows are what it sees, and should
    give."""

    floor: Tensor
    fraction: Tensor
    scale: Tensor
    limits: tuple[int, int]
    inputs: Tensor
    outputs: Tensor
    bias: Tensor | None

    def integers(self, up: Tensor) -> Tensor:
        return (self.floor + up).clamp(*self.limits)

    def error(self, up: Tensor, rows: Tensor | slice) -> Tensor:
        """Squared error of the layer's outputs, mean over rows, summed over channels."""
        got = F.linear(self.inputs[rows], self.integers(up) * self.scale[:, None], self.bias)
        return (got - self.outputs[rows]).square().sum(1).mean()


def reconstruct_(
    model: nn.Module,
    config: ConfigMap,
    loader: Iterable[Any],
    *,
    steps: int = 1000,
    filter_fn: FilterFn | None = None,
    observer: Observer = DEFAULT_OBSERVER,
) -> ToolReport:
    """`quantize_` with learned rounding (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization",
    2020): each layer's integers are trained to reproduce the float layer's outputs on the loader's inputs. Label-free.

    Layer by layer in the order in which they run, each on what the quantized layers before it put out (the paper's
    asymmetric form). The weight is `scale * clamp(floor(w / scale) + h(v))`, h the rectified sigmoid, with a
    regularizer whose beta falls from 20 to 2 and drives h to 0 or 1. Where learning does not beat the nearest integers
    on the kept rows (some 4096), these stay. Deterministic; the global random state is neither read nor changed.

    Args:
        config, filter_fn, observer: as for `quantize_`. Of the configs, all but `Binary` and 1-bit weights, whose
            rounding is a sign.
        loader: batches; 1000 rows and more. They are kept in memory, and run through the model twice a layer.
        steps: of Adam, a layer.

    Helps most with 2 to 4 bits; at 8 bits the nearest integers lose next to nothing. Some hundred rows are too few:
    learning then fits the rows, not the layer. Training with `prepare_qat_` and a `Distiller` goes further, and longer.

    Returns:
        For each layer the relative squared error of its outputs, nearest -> learned.

    Raises:
        TypeError, ValueError: as for `quantize_`; steps is not positive; a config has 1-bit weights or is a Codebook;
            the loader is empty, or no batch came through a layer. Nothing was changed.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps: expected a positive integer, got {steps!r}")
    plan = plan_layers(model, config, filter_fn, why_not_linear)
    for name, target in plan.chosen.items():
        if isinstance(target.config, Binary) or (isinstance(target.config, LowBit) and target.config.weight_bits == 1):
            raise ValueError(f"config: {name!r} gets {target.config}, whose rounding is a sign; use 2 bits or more")
        if isinstance(target.config, Codebook):
            raise ValueError(f"config: {name!r} gets {target.config}, which has no grid to round to; use quantize_")
    check_post_training(plan)
    batches = list(loader)
    layers = {name: target.module for name, target in plan.chosen.items()}
    states = observe_inputs(model, layers, batches, observer)
    student = copy.deepcopy(model)
    built: dict[int, InferenceLinear] = {}
    errors: dict[str, str] = {}
    for name in _order(model, layers, batches):
        target = plan.chosen[name]
        if id(target.module) in built:
            continue
        bits = _act_bits(target.config)
        grid = None if bits is None else states[name].grid(bits)
        inputs, outputs = _rows(student, model, name, batches)
        case = _case(target.module, target.config, grid, inputs, outputs)
        up, errors[name] = _learn(case, steps)
        built[id(target.module)] = _layer(target.module, target.config, grid, case, up)
        for other, same in plan.chosen.items():
            if same.module is target.module:
                parent, _, key = other.rpartition(".")
                setattr(student.get_submodule(parent), key, built[id(target.module)])
        run_layers_of_transformers(student)
    report = plan.carry_out(model, lambda name, target: _of(built, name, target.module), True)
    return ToolReport({n: f"{c}, {errors.get(n, 'shared')}" for n, c in report.changed.items()}, report.left)


def _of(built: dict[int, InferenceLinear], name: str, module: nn.Module) -> InferenceLinear:
    if id(module) not in built:
        raise ValueError("loader: no batch came through this layer; leave it out with filter_fn")
    return built[id(module)]


def _act_bits(config: Config) -> int | None:
    """Bits of activations whose grid is fixed; None where it is not."""
    if isinstance(config, LowBit):
        return config.act_bits
    return 8 if isinstance(config, Int8Static) else None


def _order(model: nn.Module, layers: dict[str, Any], batches: list[Any]) -> list[str]:
    """The layers' names in the order of their first call."""
    order: dict[str, None] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _module, _args, name=name: order.setdefault(name))
        for name, layer in layers.items()
    ]
    try:
        run_batches(model, batches[:1], "loader")
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _rows(student: nn.Module, model: nn.Module, name: str, batches: list[Any]) -> tuple[Tensor, Tensor]:
    """The layer's inputs in the student and its outputs in the float model, of the same rows, float32."""
    kept: list[list[Tensor]] = [[], []]
    for which, (side, values) in enumerate(zip((student, model), kept, strict=True)):
        generator = torch.Generator().manual_seed(0)
        share = -(-ROWS // len(batches))

        def hook(
            _module: nn.Module,
            args: tuple[Tensor, ...],
            output: Tensor,
            which: int = which,
            values: list[Tensor] = values,
            generator: torch.Generator = generator,
            share: int = share,
        ) -> None:
            value = output if which else args[0]
            rows = value.detach().reshape(-1, value.shape[-1])
            values.append(rows[torch.randperm(len(rows), generator=generator)[:share]].float())

        handle = side.get_submodule(name).register_forward_hook(hook)
        try:
            run_batches(side, batches, "loader")
        finally:
            handle.remove()
    return torch.cat(kept[0]), torch.cat(kept[1])


def _case(linear: nn.Linear, config: Config, grid: AffineGrid | None, inputs: Tensor, outputs: Tensor) -> _Case:
    weight = linear.weight.detach().float()
    bits = config.weight_bits if isinstance(config, LowBit) else 8
    scale = low_bit_weight_scale(weight, bits) if isinstance(config, LowBit) else int8_weight_scale(weight)
    scaled = weight / scale[:, None]
    if grid is not None:
        inputs = fake_input(inputs, grid.scale, grid.zero_point, _act_bits(config) or 8)
    elif isinstance(config, Int8Dynamic):
        inputs = kk.fake_quantize_rows(inputs)
    bias = None if linear.bias is None else linear.bias.detach().float()
    return _Case(scaled.floor(), scaled - scaled.floor(), scale, weight_range(bits), inputs, outputs, bias)


def _rectified(v: Tensor) -> Tensor:
    low, high = STRETCH
    return (torch.sigmoid(v) * (high - low) + low).clamp(0, 1)


def _learn(case: _Case, steps: int) -> tuple[Tensor, str]:
    """Which weights go up (0 or 1, float32 `[N, K]`), and the relative error, nearest -> learned."""
    nearest = (case.fraction > 0.5).float()
    low, high = STRETCH
    # h(v) starts at the fraction: the weight starts unrounded.
    v = torch.logit((case.fraction - low) / (high - low)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    power = float(case.outputs.square().sum(1).mean()) or 1.0
    with torch.enable_grad():
        for step in range(steps):
            rows = torch.randint(len(case.inputs), (min(BATCH, len(case.inputs)),), generator=generator)
            up = _rectified(v)
            loss = case.error(up, rows) / power
            progress = (step / steps - WARM_UP) / (1 - WARM_UP)
            if progress >= 0:
                beta = BETA[1] + (BETA[0] - BETA[1]) * (1 - progress)
                loss = loss + REGULARIZER * (1 - (2 * up - 1).abs().pow(beta)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    learned = (_rectified(v.detach()) >= 0.5).float()
    before, after = (float(case.error(up, slice(None))) / power for up in (nearest, learned))
    if not after < before:
        return nearest, f"output error {before:.3g}, nearest integers"
    return learned, f"output error {before:.3g} -> {after:.3g}"


def _layer(linear: nn.Linear, config: Any, grid: AffineGrid | None, case: _Case, up: Tensor) -> InferenceLinear:
    """The inference layer that holds these integers: quantizing `integer * scale` gives the integer back."""
    rounded = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    rounded.weight = nn.Parameter(case.integers(up) * case.scale[:, None], requires_grad=False)
    rounded.bias = linear.bias
    if isinstance(config, LowBit):
        assert grid is not None
        return LowBitLinear.from_float(rounded, config, input_grid=grid, weight_scale=case.scale)
    return Int8Linear.from_float(rounded, config, input_grid=grid, weight_scale=case.scale)
