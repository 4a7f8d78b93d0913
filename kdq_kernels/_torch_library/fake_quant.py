"""The fake-quant family: shape inference and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdq_kernels._torch_library.fakes import fake


def dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Shape and strides of the real operator's result: those of x if it is dense in memory, else contiguous."""
    return torch.empty_like(x, dtype=dtype)


@fake("fake_quantize")
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    return dense_like(x if group_size is None else x.contiguous(), x.dtype)


@fake("fake_quantize.out")
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
    *,
    out: Tensor,
) -> None:
    return None


@fake("fake_quantize_backward")
def _(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dense = x.contiguous() if group_size is not None else dense_like(x, x.dtype)
    grad_x = dense_like(dense, x.dtype) if grad.stride() == dense.stride() else x.new_empty(x.shape)
    grad_scale = scale.new_empty(scale.shape, dtype=torch.float32)
    return grad_x, grad_scale, torch.empty_like(grad_scale)


@fake("fake_quantize_backward_")
def _(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> tuple[Tensor, Tensor]:
    grad_scale = scale.new_empty(scale.shape, dtype=torch.float32)
    return grad_scale, torch.empty_like(grad_scale)


@fake("quantize")
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    if quant_min >= -128 and quant_max <= 127:
        dtype = torch.int8
    elif quant_min >= 0 and quant_max <= 255:
        dtype = torch.uint8
    else:
        dtype = torch.int32
    return dense_like(x if group_size is None else x.contiguous(), dtype)


@fake("dequantize")
def _(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    return dense_like(q if group_size is None else q.contiguous(), torch.float32)


@fake("quantize_rows")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@fake("fake_quantize_rows")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@fake("binarize_rows")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@fake("binarize_rows_backward")
def _(grad_signs: Tensor | None, grad_mean: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@fake("binarize_rows_backward_")
def _(grad: Tensor, x: Tensor, scaled: bool) -> None:
    return None


def _save_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.quant_min, ctx.quant_max, ctx.axis, ctx.group_size = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, scale, zero_point = ctx.saved_tensors
    grad_x, grad_scale, grad_zero_point = torch.ops.kdq.fake_quantize_backward(
        grad, x, scale, zero_point, ctx.quant_min, ctx.quant_max, ctx.axis, ctx.group_size
    )
    learned = zero_point is not None and zero_point.is_floating_point()
    return grad_x, grad_scale, grad_zero_point if learned else None, None, None, None, None


def _fake_quantize_rows_backward(ctx: Any, grad: Tensor) -> Tensor:
    """Straight through: with a scale from the row's own maximum nothing is clipped."""
    return grad


def _save_binarize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0])


def _binarize_backward(ctx: Any, grad_signs: Tensor | None, grad_mean: Tensor | None) -> Tensor | None:
    if grad_signs is None and grad_mean is None:
        return None
    (x,) = ctx.saved_tensors
    return torch.ops.kdq.binarize_rows_backward(grad_signs, grad_mean, x)


torch.library.register_autograd("kdq::fake_quantize", _fake_quantize_backward, setup_context=_save_fake_quantize)
torch.library.register_autograd("kdq::fake_quantize_rows", _fake_quantize_rows_backward)
torch.library.register_autograd("kdq::binarize_rows", _binarize_backward, setup_context=_save_binarize)
