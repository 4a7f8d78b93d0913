"""Bit planes: shape inference."""

from __future__ import annotations

import torch
from torch import Tensor

from kdq_kernels._torch_library.fakes import fake


@fake("pack_bitplanes")
def _(q: Tensor, bits: int, form: str) -> Tensor:
    return q.new_empty((bits, *q.shape[:-1], (q.shape[-1] + 63) // 64), dtype=torch.int64)


@fake("unpack_bitplanes")
def _(planes: Tensor, k: int, form: str) -> Tensor:
    dtype = torch.uint8 if form == "unsigned" else torch.int8
    return planes.new_empty((*planes.shape[1:-1], k), dtype=dtype)


@fake("bitplane_matmul")
def _(a_planes: Tensor, b_planes: Tensor, k: int, a_form: str, b_form: str) -> Tensor:
    return a_planes.new_empty((a_planes.shape[1], b_planes.shape[1]), dtype=torch.int32)


@fake("bitplane_linear")
def _(
    x: Tensor,
    weight_planes: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    input_quant_max: int,
    weight_form: str,
    activation: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_planes.shape[1]))
