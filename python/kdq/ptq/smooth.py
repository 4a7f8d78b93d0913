"""SmoothQuant: moves the ranges of activation channels into the weights that read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.calibrate import run_batches
from kdq.layers.attention import PROJECTIONS, MultiheadAttention
from kdq.ptq.chains import Rewrites, chains, convolutions, names_of, used_twice, why_not_float
from kdq.ptq.equalize import HOMOGENEOUS
from kdq.ptq.tool_report import ToolReport

PRODUCERS = (nn.LayerNorm, nn.Linear)
SMALLEST_FACTOR = 1e-5
Producer = tuple[str, nn.Module]


def smooth_(model: nn.Module, loader: Iterable[Any], alpha: float = 0.5) -> ToolReport:
    """SmoothQuant (Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
    Models", 2023): divides input channel j of a linear layer by `s[j] = max|x[j]|**alpha / max|w[:, j]|**(1 - alpha)`,
    in the layer that produces it, and multiplies column j of its weight by it.

    The producer must be known to feed this layer alone. In a plain nn.Sequential that is a LayerNorm or Linear before
    it, with nothing but ReLU, LeakyReLU or dropout between. In nn.TransformerEncoderLayer: norm2 for linear1 and, where
    attention is opened (`open_attention_`), norm1 for its q_proj, k_proj and v_proj together, both if norm_first (else
    the residual sum reads what they read); and linear1 for linear2 if the activation is a ReLU. In opened attention:
    v_proj for out_proj, since attention adds up values channel by channel. All other linear layers are left, and the
    report says why. The float model computes the same to rounding.

    Args:
        loader: batches; their largest magnitudes count, a few hundred rows do.
        alpha: from 0 (nothing from the activations) to 1 (all).

    Helps where a few activation channels are far larger than the others, as in transformers, and activations are
    quantized (`Int8Dynamic`, `Int8Static`, `LowBit`). Does nothing for `Int8WeightOnly`, and with few-bit weights it
    may cost more in the weights than it wins: lower alpha then.

    Raises:
        ValueError: alpha is not within [0, 1], the loader is empty, or weights are NaN or infinite. Nothing was
            changed.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha!r}")
    producers, left = _producers(model)
    consumers = {name: model.get_submodule(name) for name in producers}
    largest = _largest_inputs(model, consumers, loader)
    rewrites = Rewrites()
    changed: dict[str, str] = {}
    for (producer_name, producer), names in _by_producer(producers).items():
        if not all(name in largest for name in names):
            left |= dict.fromkeys(names, "no batch came through it")
            continue
        inputs = torch.stack([largest[name] for name in names]).amax(0)
        weights = torch.cat([rewrites.of(consumers[name])[0] for name in names]).abs().amax(0)
        factor = _factor(inputs, weights, alpha)
        rewrites.scale_outputs(producer, 1 / factor)
        for name in names:
            rewrites.scale_inputs(consumers[name], factor)
            changed[name] = (
                f"channels divided by {float(factor.min()):.3g} to {float(factor.max()):.3g} in {producer_name}"
            )
    rewrites.carry_out(names_of(model))
    return ToolReport(changed, left)


def _by_producer(producers: dict[str, Producer]) -> dict[Producer, list[str]]:
    """The layers that each one feeds."""
    consumers: dict[Producer, list[str]] = {}
    for name, producer in producers.items():
        consumers.setdefault(producer, []).append(name)
    return consumers


def _factor(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s of each channel; 1 where it has no inputs or no weights."""
    factor = (inputs**alpha / weights ** (1 - alpha)).clamp_min(SMALLEST_FACTOR)
    return torch.where((inputs > 0) & (weights > 0), factor, torch.ones_like(factor))


def _largest_inputs(model: nn.Module, layers: dict[str, nn.Module], loader: Iterable[Any]) -> dict[str, Tensor]:
    """float64 `[K]`: max|x| of each input channel, of finite elements."""
    largest: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).double().abs()
            if len(rows):
                seen = torch.where(torch.isfinite(rows), rows, 0.0).amax(0)
                largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

        return hook

    handles = [layer.register_forward_pre_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        run_batches(model, loader, "loader")
    finally:
        for handle in handles:
            handle.remove()
    return largest


def _producers(model: nn.Module) -> tuple[dict[str, Producer], dict[str, str]]:
    """The layer that may be divided in place of each linear layer's input; and the reason where there is none."""
    twice = used_twice(model)
    found: dict[str, Producer] = {}
    left: dict[str, str] = {}

    def add(name: str, consumer: nn.Module, producer: Producer | str) -> None:
        reason = why_not_float(consumer, (nn.Linear,), twice)
        if reason is None:
            reason = producer if isinstance(producer, str) else _why_not_producer(producer, consumer, twice)
        if reason is None and not isinstance(producer, str):
            found[name] = producer
        else:
            left[name] = str(reason)

    for chain in chains(model):
        visible = [(name, module) for name, module in chain if type(module) not in HOMOGENEOUS]
        for at, (name, module) in enumerate(visible):
            if isinstance(module, nn.Linear):
                add(name, module, visible[at - 1] if at else "it is the first in its nn.Sequential")
    for name, module in model.named_modules():
        if type(module) is nn.TransformerEncoderLayer:
            for part, producer in _encoder_producers(name, module).items():
                add(f"{name}.{part}" if name else part, module.get_submodule(part), producer)
    for name, module in model.named_modules():
        if type(module) is MultiheadAttention:
            prefix = f"{name}." if name else ""
            add(f"{prefix}out_proj", module.out_proj, (f"{prefix}v_proj", module.v_proj))
    _leave_incomplete(model, found, left)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in found and name not in left:
            left[name] = "what feeds it is not known: it is not in a plain nn.Sequential or nn.TransformerEncoderLayer"
    left |= {name: "a convolution: only linear layers are smoothed" for name, _ in convolutions(model)}
    return found, left


def _encoder_producers(name: str, layer: Any) -> dict[str, Producer | str]:
    prefix = f"{name}." if name else ""
    relu = layer.activation is F.relu or layer.activation is torch.relu or type(layer.activation) is nn.ReLU
    residual = "without norm_first, the residual sum reads its input too"
    producers: dict[str, Producer | str] = {
        "linear1": (f"{prefix}norm2", layer.norm2) if layer.norm_first else residual,
        "linear2": (f"{prefix}linear1", layer.linear1)
        if relu
        else "the activation before it is not a ReLU: factors do not pass through",
    }
    if type(layer.self_attn) is MultiheadAttention:
        for part in PROJECTIONS:
            producers[f"self_attn.{part}"] = (f"{prefix}norm1", layer.norm1) if layer.norm_first else residual
    return producers


def _leave_incomplete(model: nn.Module, found: dict[str, Producer], left: dict[str, str]) -> None:
    """A norm that feeds several projections may be divided for all of them or for none."""
    for name, module in model.named_modules():
        if type(module) is not MultiheadAttention:
            continue
        together = [f"{name}.{part}" if name else part for part in PROJECTIONS]
        missing = next((part for part in together if part not in found), None)
        for part in together:
            if missing is not None and found.pop(part, None) is not None:
                left[part] = f"{missing}, which reads the same, is left"


def _why_not_producer(producer: Producer, consumer: Any, twice: set[int]) -> str | None:
    name, module = producer
    reason = why_not_float(module, PRODUCERS, twice)
    if reason is not None:
        return f"before it, {name}: {reason}"
    layer: Any = module
    if layer.weight is None:
        return f"before it, {name}: a LayerNorm without elementwise_affine has nothing to divide"
    if layer.weight.dim() == 1 and len(layer.weight) != consumer.in_features:
        return f"before it, {name}: normalizes {len(layer.weight)} features, not {consumer.in_features}"
    if layer.weight.dim() > 1 and (isinstance(layer, nn.LayerNorm) or layer.out_features != consumer.in_features):
        return f"before it, {name}: its output channels are not this layer's {consumer.in_features} inputs"
    return None
