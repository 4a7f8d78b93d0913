"""WeightAverage: a moving average of a model's weights beside its training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdq.distributed import distribute_as, to_save


class WeightAverage:
    """An exponential moving average of a model's parameters, learned scales among them, and buffers.

    After step n: `average = d * average + (1 - d) * weights` with `d = min(decay, (1 + n) / (10 + n))`, so that the
    first steps are soon forgotten (Polyak, Juditsky: Acceleration of Stochastic Approximation by Averaging, 1992;
    warm-up as in TensorFlow's ExponentialMovingAverage). Floating-point buffers, as the statistics of batch norms, are
    averaged alike; others, as counters, are the latest. A scale that its first batch has only just initialized is taken
    as it is. Averages are float32 at least.

    Args:
        model: changed by `update` never, by `put_in` and `in_place` as they say.
        decay: d, at least 0 and below 1; 0.999 averages over some thousand steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema: expected a decay from 0 to below 1, got {decay!r}")
        self.model = model
        self.decay = decay
        self.steps = 0
        self.values = {name: wide(tensor.detach()).clone() for name, tensor in self._tensors()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's weights in; called after each step."""
        self.steps += 1
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        fresh = self._just_initialized()
        for name, tensor in self._tensors():
            if tensor.is_floating_point() and name.rpartition(".")[0] not in fresh:
                self.values[name].lerp_(tensor.to(self.values[name].dtype), share)
            else:
                self.values[name].copy_(tensor)

    def _just_initialized(self) -> set[str]:
        """Names of the modules whose `initialized` was false at the last update: what they had been is no weight."""
        return {
            name.rpartition(".")[0]
            for name, tensor in self._tensors()
            if name.rpartition(".")[2] == "initialized" and bool(tensor) and not bool(self.values[name])
        }

    def put_in(self) -> None:
        """The model's weights become the average."""
        self._write(self.values)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's weights are the average; afterwards they are its own again."""
        own = {name: tensor.detach().clone() for name, tensor in self._tensors()}
        self.put_in()
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors():
            tensor.copy_(values[name])
        torch.clear_autocast_cache()  # an autocast around it all would go on with the weights of before

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "values": to_save(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises:
        RuntimeError: it is of a model with other weights.
        """
        if state["values"].keys() != self.values.keys():
            raise RuntimeError("state: its weights are not those of the model")
        self.steps = state["steps"]
        for name, value in self.values.items():
            value.copy_(distribute_as(value, state["values"][name]))


def wide(tensor: Tensor) -> Tensor:
    """float32 where it is less."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor
