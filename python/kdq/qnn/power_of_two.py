"""The nearest power of two: multiplying by it is a shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _PowerOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return nearest(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def nearest(x: Tensor) -> Tensor:
    """`power_of_two` without a gradient. By the exponent itself: a logarithm would be off next to a tie."""
    mantissa, exponent = torch.frexp(x)  # |mantissa| from 1/2 to 1
    exponent -= (mantissa.double().square() < 0.5).int()
    return torch.where(torch.isfinite(x), torch.ldexp(torch.sign(x), exponent), x)


def power_of_two(x: Tensor) -> Tensor:
    """`sign(x) * 2**round(log2(|x|))`, like x: the AP2 of Hubara et al. 2016. 0 stays 0, infinities and NaN as they
    are.

    Differentiable straight through: the gradient is passed on as it is.
    """
    y: Tensor = _PowerOfTwo.apply(x)
    return y
