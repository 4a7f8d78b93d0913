"""prune_: weights of the least magnitude become 0, and stay 0 while the others train on."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn

from kdq.configs import Pruned
from kdq.layers.pruned import PrunedLinear, smallest
from kdq.planning import ConversionReport, FilterFn, plan_layers, why_not_linear_or_pruned

Scope = Literal["layer", "global"]


def prune_(
    model: nn.Module, sparsity: float, filter_fn: FilterFn | None = None, *, scope: Scope = "layer"
) -> ConversionReport:
    """Prunes a model's linear layers by magnitude, in place and all or nothing.

    Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks, 2015. Train on after
    each call and prune again, further (`pruning_phases` does both with `Distiller.run`): pruned weights stay 0 in any
    training loop and with any optimizer, also one that was made before, since the parameters stay the same. Then
    `prepare_qat_`, `quantize_` and `lower_precision_` take the layers as they are, and `convert_` makes plain nn.Linear
    layers with zeros of them.

        for sparsity in (0.5, 0.8, 0.9):
            kdq.prune_(model, sparsity)
            distiller.fit(loader, epochs=5)

    Args:
        model: any module that contains nn.Linear layers, pruned before or not.
        sparsity: the share of weights that are 0 afterwards, from 0 to below 1, to the nearest whole weight.
        filter_fn: `filter_fn(module, name)`; only layers for which it is true are pruned.
        scope: "layer": so many of every layer. "global": so many of all layers together, with one threshold.

    Returns:
        What was changed, with the sparsity that each layer has now, and what was left and why.

    Raises:
        ValueError: sparsity or scope is out of range; there is no layer to prune, or more of one is pruned already; a
            weight is not finite. Nothing was changed.
    """
    check_sparsity(sparsity)
    if scope not in ("layer", "global"):
        raise ValueError(f"scope: expected 'layer' or 'global', got {scope!r}")
    plan = plan_layers(model, {}, filter_fn, why_not_linear_or_pruned, config_of=lambda _: Pruned(sparsity=sparsity))
    layers: dict[int, Any] = {id(target.module): target.module for target in plan.chosen.values()}
    if not layers:
        raise ValueError(
            "model: it has no layer to prune: "
            + "; ".join(f"{name or 'the model'}: {why}" for name, why in list(plan.left.items())[:5])
        )
    groups = [list(layers.values())] if scope == "global" else [[layer] for layer in layers.values()]
    masks: dict[int, Tensor] = {}
    for group in groups:
        masks |= {id(layer): mask for layer, mask in zip(group, _masks(group, sparsity), strict=True)}
    built = {key: PrunedLinear(layer, masks[key]) for key, layer in layers.items()}
    for target in plan.chosen.values():
        target.config = built[id(target.module)].config
    return plan.carry_out(model, lambda _, target: built[id(target.module)])


def check_sparsity(sparsity: float) -> None:
    if not (math.isfinite(sparsity) and 0 <= sparsity < 1):
        raise ValueError(f"sparsity: expected from 0 to below 1, got {sparsity!r}")


def _masks(layers: list[nn.Linear | PrunedLinear], sparsity: float) -> list[Tensor]:
    """Of layers that share a threshold.

    Raises:
        ValueError: more is pruned already.
    """
    weights = sum(layer.weight.numel() for layer in layers)
    count = round(sparsity * weights)
    before = sum(int(layer.pruned.sum()) for layer in layers if isinstance(layer, PrunedLinear))
    if count < before:
        raise ValueError(
            f"sparsity: {before / weights:.1%} is pruned already, more than {sparsity:.1%}; pruned weights do not "
            "come back"
        )
    return smallest(layers, count)
