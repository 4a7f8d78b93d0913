"""Quantized gradients: of what a layer put out, before they go back into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdq.qnn.power_of_two import nearest


def stochastic(grad: Tensor, bits: int) -> Tensor:
    """DoReFa-Net's gradients (Zhou et al. 2016): `2**bits` levels from -max to max of each row (all axes but the
    first), rounded by chance to the one above or below, so that the mean is kept."""
    levels = 2**bits - 1
    largest = grad.flatten(1).abs().amax(1).view(-1, *[1] * (grad.dim() - 1))
    unit = (grad / (2 * largest) + 0.5) * levels
    q = torch.round(unit + torch.rand_like(unit) - 0.5).clamp_(0, levels)
    return torch.where(largest > 0, (q / levels - 0.5) * (2 * largest), 0.0)


def logarithmic(grad: Tensor, bits: int) -> Tensor:
    """The nearest power of two, of the `2**(bits - 1) - 1` from the tensor's largest downwards, or 0 below these: sign
    and exponent take `bits` (logarithmic quantization, Hubara et al. 2016)."""
    powers = nearest(grad)
    smallest = powers.abs().amax() * 2.0 ** -(2 ** (bits - 1) - 2)
    return torch.where(powers.abs() < smallest, 0.0, powers)


METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {"stochastic": stochastic, "log": logarithmic}


class _QuantizeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, method: str) -> Tensor:
        ctx.bits, ctx.method = bits, method
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return grad if grad.numel() == 0 else METHODS[ctx.method](grad, ctx.bits), None, None


class QuantizeGradient(nn.Module):
    """x as it is; in training, its gradient in few bits. Put behind a linear layer, whose two backward products then
    take quantized gradients.

    Args:
        bits: 2 to 8, the sign among them.
        method: "stochastic" (DoReFa-Net, Zhou et al. 2016; from torch's global generator) or "log" (powers of two,
            Hubara et al. 2016).

    Raises:
        ValueError: bits or method is none of these.
    """

    def __init__(self, bits: int, method: str = "stochastic") -> None:
        super().__init__()
        if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
            raise ValueError(f"bits: expected an integer from 2 to 8, got {bits!r}")
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        self.bits = bits
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        y: Tensor = _QuantizeGradient.apply(x, self.bits, self.method)
        return y

    def extra_repr(self) -> str:
        return f"{self.bits}, method={self.method!r}"
