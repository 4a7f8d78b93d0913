"""Calibration: what values the activations of chosen layers take on a user's data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdq.grids import AffineGrid, search_affine_grid
from kdq.observe import evaluating, parse_batch

SAMPLE_SIZE = 1 << 16


class Observer:
    """Keeps the range of what it sees, and an evenly spaced sample of it for the search of the grid."""

    def __init__(self) -> None:
        self.low = float("inf")
        self.high = float("-inf")
        self.samples: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        values = x.detach().float().flatten()
        values = values[torch.isfinite(values)]
        if values.numel() == 0:
            return
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        self.samples.append(values[:: max(1, values.numel() // SAMPLE_SIZE)].clone())

    def grid(self, bits: int) -> AffineGrid:
        """The activation grid with the least squared error on what was seen.

        Raises:
            RuntimeError: nothing was seen.
        """
        if not self.samples:
            raise RuntimeError("calibration saw no finite activation of this layer")
        sample = torch.cat(self.samples)
        sample = sample[:: max(1, sample.numel() // SAMPLE_SIZE)]
        return search_affine_grid(sample, self.low, self.high, bits)


def observe_inputs(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, Observer]:
    """Runs the batches through the model, in eval mode and without gradients, and observes the layers' inputs.

    Raises:
        ValueError: there are no batches.
    """
    observers = {name: Observer() for name in layers}
    handles = [
        module.register_forward_pre_hook(lambda _, args, observer=observers[name]: observer(args[0]))
        for name, module in layers.items()
    ]
    count = 0
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                parsed = parse_batch(batch)
                model(*parsed.args, **parsed.kwargs)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ValueError("calibration: expected at least one batch, got none")
    return observers
