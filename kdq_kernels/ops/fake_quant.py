"""Quantization grids: to integers and back, per tensor, channel, group or row, and the signs of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kdq_kernels.ops.arguments import as_scale, as_zero_point

_ops = torch.ops.kdq


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float | None = None,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rounds x to a quantization grid and back: `(clamp(round(x / scale) + zero_point) - zero_point) * scale`.

    Rounding is half-to-even and multiplies by the float32 inverse of the scale, so the bits equal those of
    `torch.fake_quantize_per_{tensor,channel}_affine`. Differentiable in x (straight-through inside the grid), scale
    and a float zero_point (LSQ, Esser et al. 2020; LSQ+, Bhalgat et al. 2020), all in one backward pass.

    Args:
        x: any shape; NaN propagates, infinities clamp.
        scale: positive, finite. One element (per tensor), `[x.size(axis)]` (per channel), or `[..., K / group_size]`
            for x `[..., K]` (per group).
        zero_point: int32 in `[quant_min, quant_max]`, or float32, which is rounded half-to-even and clamped. Shape of
            scale.
        quant_min, quant_max: the integer range, within ±2^23.
        axis: the channel axis; negative counts from the end.
        group_size: length of the groups along the last axis.
        out: receives the result (inference only).

    Raises:
        ValueError: a shape, dtype or value is wrong.
        RuntimeError: `out` is given where a gradient is needed.
    """
    scale, zero_point = as_scale(scale, x), as_zero_point(zero_point, x)
    if out is None:
        return _ops.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis, group_size)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        raise RuntimeError("fake_quantize: out= does not support automatic differentiation")
    _ops.fake_quantize.out(x, scale, zero_point, quant_min, quant_max, axis, group_size, out=out)
    return out


def quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float | None = None,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """The integers of `fake_quantize`: int8 where the range fits, else uint8, else int32. NaN gives the zero point."""
    return _ops.quantize(x, as_scale(scale, x), as_zero_point(zero_point, x), quant_min, quant_max, axis, group_size)


def dequantize(
    q: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float | None = None,
    *,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """`(q - zero_point) * scale` in float32, for q int8, uint8 or int32."""
    return _ops.dequantize(q, as_scale(scale, q), as_zero_point(zero_point, q), axis, group_size)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[..., K]` -> (q int8 `[..., K]` in [-127, 127], scale float32 `[...]`), `scale = max|row| / 127`.

    Rows of zeros get q = 0 and the smallest normal float32 as scale. NaN or inf makes the scale of its row NaN or
    inf, and q zero there.
    """
    return _ops.quantize_rows(x)


def fake_quantize_rows(x: Tensor) -> Tensor:
    """`quantize_rows` and back: x `[..., K]` -> `q * scale`, like x.

    Differentiable: nothing is clipped, so the straight-through gradient is the identity. A row with NaN or inf becomes
    NaN.
    """
    return _ops.fake_quantize_rows(x)


def binarize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[..., K]` -> (signs like x: -1 where x < 0, else 1; float32 `[...]`: the mean of `|x|` over each row).

    Differentiable: straight through the signs where `|x| <= 1` (Courbariaux et al. 2016), exact through the mean, which
    is XNOR-Net's scale of a channel (Rastegari et al. 2016).
    """
    return _ops.binarize_rows(x)
