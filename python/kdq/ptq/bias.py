"""Bias correction: takes back the shift of the mean that quantization gives a layer's outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdq.calibrate import run_batches
from kdq.layers.base import InferenceConv2d, InferenceProduct
from kdq.observe import find_layer
from kdq.ptq.tool_report import ToolReport


def correct_bias_(quantized: nn.Module, reference: nn.Module, loader: Iterable[Any]) -> ToolReport:
    """Empirical bias correction (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction", 2019): adds to each quantized layer's bias what the mean of each output channel lacks to
    that of the float model.

    Layer by layer in the order in which they run, each with those before it corrected: one pass over the loader for
    the reference and one for each layer. Batches are kept in memory meanwhile.

    Args:
        quantized: after `quantize_` or `convert_`; all its linear layers and convolutions on kernels are corrected.
        reference: the float model with layers of the same names and shapes, as it was right before it was quantized:
            after `fold_batch_norm_`, `equalize_` and `smooth_`, which change what its layers put out. That a batch norm
            was folded shows and is checked; of the other two nothing can be seen.
        loader: batches; some hundred rows do.

    Helps where rounding errors do not cancel over an input's features, as after a ReLU, whose outputs are all positive:
    markedly below 8 bits. At 8 bits the shift is small. Does nothing about the error's variance (see `reconstruct_`);
    a batch norm after the layer may instead be measured anew with `reestimate_batch_norm_`.

    Raises:
        ValueError: the loader is empty, the reference lacks a layer, its output has another shape, it has a batch norm
            that was folded in quantized, or a layer's mean is not finite. All biases are then as they were.
    """
    layers: dict[str, Any] = {n: m for n, m in quantized.named_modules() if isinstance(m, InferenceProduct)}
    twins = {name: find_layer(reference, name, "reference") for name in layers}
    _check_folded(quantized, reference)
    batches = list(loader)
    expected = _mean_outputs(reference, twins, batches)
    saved = {name: layer.bias for name, layer in layers.items()}
    changed: dict[str, str] = {}
    try:
        for name in expected:  # in the order in which they ran
            layer = layers[name]
            got = _mean_outputs(quantized, {name: layer}, batches).get(name)
            if got is None or got.shape != expected[name].shape:
                raise ValueError(f"reference: {name!r} puts out {len(expected[name])} channels, not as quantized does")
            shift = expected[name] - got
            if not torch.isfinite(shift).all():
                raise ValueError(f"{name}: the mean of its outputs is NaN or infinite")
            layer.bias = (shift if layer.bias is None else layer.bias + shift).float()
            changed[name] = f"bias shifted by up to {float(shift.abs().max()):.3g}"
    except BaseException:
        for name, layer in layers.items():
            layer.bias = saved[name]
        raise
    left = {name: "no batch came through it" for name in twins if name not in changed}
    return ToolReport(changed, left)


def _check_folded(quantized: nn.Module, reference: nn.Module) -> None:
    """Raises ValueError where the reference still has a batch norm that `fold_batch_norm_` took out of quantized."""
    modules = dict(reference.named_modules(remove_duplicate=False))
    for name, module in quantized.named_modules(remove_duplicate=False):
        norm = modules.get(name)
        if isinstance(module, nn.Identity) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"reference: {name!r} is a {type(norm).__name__}, which was folded in quantized; expected the float "
                "model as it was after fold_batch_norm_, right before it was quantized"
            )


def _mean_outputs(model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any]) -> dict[str, Tensor]:
    """float64 `[channels]`: the mean of each output channel over all rows, or images and positions, before a fused
    activation; layers in the order of their first call."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if isinstance(module, InferenceProduct) and module.activation is not None:
                output = module.kernel(module.geometry.batched(args[0]), None)
            if isinstance(module, nn.Conv2d | InferenceConv2d):
                output = output.movedim(-3, -1)
            flat = output.detach().reshape(-1, output.shape[-1]).double()
            sums[name] = sums.get(name, 0) + flat.sum(0)
            rows[name] = rows.get(name, 0) + len(flat)

        return hook

    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        run_batches(model, batches, "loader")
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / rows[name] for name, total in sums.items() if rows[name]}
