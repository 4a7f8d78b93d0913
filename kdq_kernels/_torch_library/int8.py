"""The int8 family: shape inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdq_kernels import _C
from kdq_kernels._torch_library.fakes import convolved, fake


@fake("pack_int8_weight")
def _(w: Tensor, bits: int = 8) -> Tensor:
    if w.device.type == "cuda":  # the CUDA kernels read row-major int8
        return w.new_empty(w.shape)
    n, k = w.shape
    if isinstance(n, int) and isinstance(k, int):
        row_bytes: Any = -(-_C.int8_packed_bytes(n, k, bits) // n) if n else k
    else:
        row_bytes = torch.library.get_ctx().new_dynamic_size()
    return w.new_empty((n, row_bytes), dtype=torch.uint8)


@fake("unpack_int8_weight")
def _(packed: Tensor) -> Tensor:
    if packed.device.type == "cuda":
        return packed.new_empty(packed.shape)
    k = torch.library.get_ctx().new_dynamic_size()  # only the blob itself knows K
    return packed.new_empty((packed.shape[0], k), dtype=torch.int8)


@fake("int8_matmul")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


@fake("int8_linear")
def _(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_quant_max: int = 255,
    activation: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@fake("int8_linear_chain")
def _(
    x: Tensor,
    packed: list[Tensor],
    weight_scale: list[Tensor],
    bias: list[Tensor | None],
    input_scale: list[Tensor | None],
    input_zero_point: list[Tensor | None],
    input_quant_max: list[int],
    activation: list[str],
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed[-1].shape[0]))


@fake("int8_weight_only_linear")
def _(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@fake("int8_conv2d")
def _(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_quant_max: int = 255,
    activation: str | None = None,
) -> Tensor:
    return convolved(x, packed.shape[0], kernel_size, stride, padding, dilation)
