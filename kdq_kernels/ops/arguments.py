"""What several families share: a pair of numbers as a type, and numbers that become tensors."""

from __future__ import annotations

from typing import TypeAlias, cast

import torch
from torch import Tensor

Pair: TypeAlias = tuple[int, int]


def as_tensor(value: Tensor | float | None, dtype: torch.dtype, like: Tensor | None = None) -> Tensor | None:
    """A number as a 0-d tensor, on the device of `like` or the CPU; tensors and None as they are."""
    if value is None or type(value) is Tensor:  # first: the common cases of a call that takes a microsecond or two
        return value
    if not isinstance(value, int | float):
        return value
    if dtype == torch.int32 and not float(value).is_integer():
        raise ValueError(f"input_zero_point: expected an integer, got {value}")
    if like is None or like.is_cpu:
        return torch.tensor(value, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=like.device)  # a kernel, where torch.tensor would wait for the GPU


def as_scale(scale: Tensor | float, x: Tensor) -> Tensor:
    return cast(Tensor, as_tensor(scale, torch.float32, x))


def as_zero_point(zero_point: Tensor | float | None, x: Tensor) -> Tensor | None:
    """int64 tensors, which torch's own quantizers accept, become int32; a Python float is a learned zero point."""
    if isinstance(zero_point, Tensor):
        return zero_point.to(torch.int32) if zero_point.dtype == torch.int64 else zero_point
    return as_tensor(zero_point, torch.int32 if isinstance(zero_point, int) else torch.float32, x)
