"""PrunedLinear: a linear layer in training, of whose weights some are 0 and stay so."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.configs import Pruned
from kdq.layers.qat import QATLinear


class PrunedLinear(QATLinear):
    """`x @ (weight, 0 where pruned).T + bias`.

    What a step does to a pruned weight is of no effect: it is masked out of the result and gets no gradient, whatever
    momentum or weight decay make of it. `weight` is the parameter that the layer had before, so that an optimizer may
    be kept.

    Args:
        linear: an nn.Linear, or a PrunedLinear to prune further.
        pruned: bool `[N, K]`, true where the weight is 0 from now on.
    """

    pruned: Tensor

    def __init__(self, linear: Any, pruned: Tensor) -> None:
        super().__init__(linear)
        self.register_buffer("pruned", pruned)

    @property
    def config(self) -> Pruned:
        """For reports: the share of the weights that is 0."""
        return Pruned(sparsity=float(self.pruned.sum()) / self.pruned.numel())

    def effective_weight(self) -> Tensor:
        """The weight with its zeros, `[N, K]`, differentiable in those that are left."""
        return self.weight.masked_fill(self.pruned, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.bias)

    def to_inference(self) -> nn.Linear:
        """A plain nn.Linear whose pruned weights are 0, in float."""
        return self.to_float()

    def to_float(self) -> nn.Linear:
        """A plain nn.Linear with a copy of the weight, in which the pruned ones are 0, and the bias itself."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.effective_weight().detach(), requires_grad=self.weight.requires_grad)
        linear.bias = self.bias
        return linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"


def plain_linear(layer: nn.Linear | PrunedLinear) -> nn.Linear:
    """The layer that a quantizer sees: of a pruned one, its plain form."""
    return layer.to_float() if isinstance(layer, PrunedLinear) else layer


def smallest(layers: list[nn.Linear | PrunedLinear], count: int) -> list[Tensor]:
    """Of all weights of some layers together, `count` with the least magnitude: a mask a layer, bool, true for those.

    Weights that are pruned already come first; of equals, the first.
    """
    sizes = [magnitude(layer) for layer in layers]
    chosen = torch.zeros(sum(s.numel() for s in sizes), dtype=torch.bool)
    chosen[torch.cat([s.flatten() for s in sizes]).argsort(stable=True)[:count]] = True
    parts = chosen.split([s.numel() for s in sizes])
    return [part.view(size.shape) for part, size in zip(parts, sizes, strict=True)]


def magnitude(layer: nn.Linear | PrunedLinear) -> Tensor:
    """`|w|` in float32; -1 where pruned."""
    size = layer.weight.detach().float().abs()
    return size.masked_fill(layer.pruned, -1.0) if isinstance(layer, PrunedLinear) else size
