"""Calibration: runs a user's batches through a model and shows the inputs of chosen layers to observers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kdq.observe import evaluating, parse_batch
from kdq.observers import Observer, ObserverState, check_observer
from kdq.ranks import gather_objects


def observe_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], observer: Observer
) -> dict[str, ObserverState]:
    """Runs the batches through the model, in eval mode and without gradients, and observes the layers' inputs.

    Within `kdq.distributed.together` the states are those of all ranks, merged in their order.

    Raises:
        TypeError: observer is not one of kdq's.
        ValueError: there are no batches.
    """
    check_observer(observer)
    states = {name: observer.start() for name in layers}
    handles = [
        module.register_forward_pre_hook(lambda _, args, state=states[name]: state.observe(args[0]))
        for name, module in layers.items()
    ]
    try:
        run_batches(model, batches, "calibration")
    finally:
        for handle in handles:
            handle.remove()
    first, *others = gather_objects(states)
    for other in others:
        for name, state in other.items():
            first[name].merge(state)
    return first


def run_batches(model: nn.Module, batches: Iterable[Any], role: str) -> None:
    """Runs the batches through the model, in eval mode and without gradients, for what its hooks see.

    Raises:
        ValueError: there are no batches; `role` names the argument.
    """
    count = 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            parsed = parse_batch(batch, model)
            model(*parsed.args, **parsed.kwargs)
            count += 1
    if count == 0:
        raise ValueError(f"{role}: expected at least one batch, got none")
