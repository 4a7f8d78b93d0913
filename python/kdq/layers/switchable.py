"""Layers that hold every precision at once: one float weight, and for each precision its own scales, grid and norms.

One precision is active, and the layer computes as its training twin of that precision does. `kdq.switch` sets it for a
whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdq.configs import Config, bits_of, config_to_json
from kdq.layers.qat import QATLinear


def precision_key(config: Config) -> str:
    """The precision's part of a state dict's keys: `LowBit_4_8`. It tells a checkpoint's precisions apart."""
    return "_".join(map(str, config_to_json(config).values())).replace(".", "_")


class Switchable(nn.Module):
    """What has one variant a precision, and one of them active; the state dict holds all of them, and which is active.

    Attributes:
        precisions: from the widest to the narrowest: by bits of the weights, then of the activations.
        variants: the modules, by `precision_key`.
    """

    precisions: tuple[Config, ...]
    variants: nn.ModuleDict

    def set_variants(self, variants: Mapping[Config, nn.Module]) -> None:
        """Takes the variants over; the widest is active."""
        widest_first = sorted(
            variants, key=lambda config: (*(-bits for bits in bits_of(config)), precision_key(config))
        )
        self.precisions = tuple(widest_first)
        self.variants = nn.ModuleDict({precision_key(config): variants[config] for config in widest_first})
        self.config = self.precisions[0]

    @property
    def config(self) -> Config:
        """The active precision; setting it switches the layer.

        Raises:
            ValueError: (setting it) the layer has no such precision.
        """
        return self._active

    @config.setter
    def config(self, config: Config) -> None:
        if config not in self.precisions:
            raise ValueError(f"precision: expected one of {', '.join(map(str, self.precisions))}, got {config}")
        self._active = config

    def variant(self) -> Any:
        """The module of the active precision."""
        return self.variants[precision_key(self._active)]

    def get_extra_state(self) -> Tensor:
        """Which precision is active, as a tensor: every format of checkpoints can hold it."""
        return torch.tensor(self.precisions.index(self._active))

    def set_extra_state(self, state: Tensor) -> None:
        index = int(state)
        if not 0 <= index < len(self.precisions):
            raise ValueError(f"state_dict: the active precision is number {index} of {len(self.precisions)}")
        self._active = self.precisions[index]


class SwitchableLinear(QATLinear, Switchable):
    """A linear layer that trains at several precisions: one float weight and bias for all, learned scales and
    activation grids for each (Any-Precision Deep Neural Networks, Yu et al. 2021).

    Args:
        linear: gives its weight and bias, as they are.
        twins: a training twin of it for each precision, which from now on has no weight of its own.
    """

    def __init__(self, linear: nn.Linear, twins: Mapping[Config, QATLinear]) -> None:
        super().__init__(linear)
        for twin in twins.values():
            del twin.weight, twin.bias
        self.set_variants(twins)

    def twin(self) -> QATLinear:
        """The active training twin, with this layer's weight and bias lent to it.

        They are lent as plain attributes, anew for each use. Registered in the twin they would be saved once a
        precision, and come apart where this layer's are exchanged (`load_state_dict(assign=True)`, `functional_call`).
        """
        twin: QATLinear = self.variant()
        object.__setattr__(twin, "weight", self.weight)
        object.__setattr__(twin, "bias", self.bias)
        return twin

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.twin()(x)
        return y

    def to_inference(self) -> nn.Module:
        """The layer on the real kernels at the active precision."""
        return self.twin().to_inference()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, active={self.config}"


class SwitchableNorm(Switchable):
    """A norm with statistics and affine parameters for each precision, all starting as copies of the given one.

    Precisions differ in the mean and variance of what they compute; shared statistics would fit none (Slimmable Neural
    Networks, Yu et al. 2019).
    """

    def __init__(self, norm: nn.Module, precisions: tuple[Config, ...]) -> None:
        super().__init__()
        self.set_variants({config: copy.deepcopy(norm) for config in precisions})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.variant()(x)
        return y

    def to_inference(self) -> nn.Module:
        """A copy of the active plain norm."""
        return copy.deepcopy(self.variant())

    def extra_repr(self) -> str:
        return f"active={self.config}"
