"""The binary family: shape inference."""

from __future__ import annotations

import torch
from torch import Tensor

from kdq_kernels._torch_library.fakes import convolved, fake


@fake("pack_signs")
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], (x.shape[-1] + 63) // 64), dtype=torch.int64)


@fake("unpack_signs")
def _(bits: Tensor, k: int) -> Tensor:
    return bits.new_empty((*bits.shape[:-1], k), dtype=torch.float32)


@fake("binary_matmul")
def _(a_bits: Tensor, b_bits: Tensor, k: int) -> Tensor:
    return a_bits.new_empty((a_bits.shape[0], b_bits.shape[0]), dtype=torch.int32)


@fake("binary_linear")
def _(x: Tensor, weight_bits: Tensor, weight_scale: Tensor, bias: Tensor | None = None, k: int | None = None) -> Tensor:
    dtype = x.dtype if x.is_floating_point() else torch.float32
    return x.new_empty((*x.shape[:-1], weight_bits.shape[0]), dtype=dtype)


@fake("binary_conv2d")
def _(
    x: Tensor,
    weight_bits: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    n, *kernel_size, _ = weight_bits.shape
    return convolved(x, n, kernel_size, stride, padding, dilation)


@fake("binary_threshold")
def _(x: Tensor, weight_bits: Tensor, threshold: Tensor, k: int | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], (weight_bits.shape[0] + 63) // 64), dtype=torch.int64)
