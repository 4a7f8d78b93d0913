"""Registering shape inference, and the shapes that several families have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def fake(name: str) -> Callable[[Function], Function]:
    """Registers the decorated function as the shape inference of `torch.ops.kdq.<name>`."""
    return torch.library.register_fake(f"kdq::{name}")


def convolved(x: Tensor, n: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Shape and memory format of a convolution's result."""
    sides = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty((x.shape[0], n, *sides), dtype=x.dtype, device=x.device, memory_format=memory_format)
