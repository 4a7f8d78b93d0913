"""The product of a training twin: forward on the integer kernels that inference will use, backward straight through.

One autograd node a layer, a linear one or a convolution (`kdq.layers.geometry` has what differs). It saves the float
input and weight and the weight's integers, and makes the rounded floats again in the backward pass: that costs a pass
over memory, where a node for each step would cost as much again in calls. A linear weight's gradient takes the memory
of the rounded weight, so that the layer needs no more fresh memory than an nn.Linear.

What bounds a step from below, beside an nn.Linear's: a learned scale of the activations needs the gradient of the
layer's input, and so one more product in a layer whose input needs none, as the first.

How a side is rounded follows from its bits and its scale (the `learned_scale` of its parameter): 1 bit is the sign (a
weight's times the mean magnitude of its channel), a learned scale is LSQ's, and without one, 8 bits take their scale
from each row's `max|x|`. Of a convolution's input, a row is an image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import kdq_kernels as kk
from kdq.grids import SMALLEST_SCALE, weight_range
from kdq.layers.geometry import Geometry


def gradient_factor(elements: int, quant_max: int) -> float:
    """`1 / sqrt(elements * quant_max)`: keeps updates of scales in proportion to those of weights (LSQ, Esser et al.
    2020, section 2.2)."""
    return 1 / math.sqrt(max(elements, 1) * max(quant_max, 1))


def learned_scale(parameter: Tensor) -> Tensor:
    """A learned scale as the forward pass uses it: its magnitude, so that a step across zero stays a valid scale."""
    return parameter.abs().clamp_min(SMALLEST_SCALE * 256)


def integer_zero_point(parameter: Tensor, bits: int) -> Tensor:
    """A learned zero point as the kernels round it."""
    return parameter.round().clamp(0, 2**bits - 1).to(torch.int32)


def fake_input(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int) -> Tensor:
    """x `[..., K]` on the grid of the activations."""
    if bits == 1:
        return kk.binarize_rows(x)[0]
    if scale is None:
        return kk.fake_quantize_rows(x)
    return kk.fake_quantize(x, scale, zero_point, quant_min=0, quant_max=2**bits - 1)


def fake_weight(weight: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """weight `[N, K]` on its grid, as a new tensor."""
    if bits == 1:
        signs, mean = kk.binarize_rows(weight)
        return signs.mul_(mean[:, None].to(signs.dtype))
    if scale is None:
        return kk.fake_quantize_rows(weight)
    quant_min, quant_max = weight_range(bits)
    return kk.fake_quantize(weight, scale, quant_min=quant_min, quant_max=quant_max, axis=0)


def weight_integers(weight: Tensor, scale: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """(int8 `[N, K]`, float32 `[N]`), whose product is `fake_weight`."""
    if bits == 1:
        signs, mean = kk.binarize_rows(weight)
        return signs.to(torch.int8), mean.clamp_min(SMALLEST_SCALE)
    if scale is None:
        return kk.quantize_rows(weight)
    quant_min, quant_max = weight_range(bits)
    return kk.quantize(weight, scale, quant_min=quant_min, quant_max=quant_max, axis=0), scale


def kernel_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    input_scale: Tensor | None,
    zero_point: Tensor | None,
    weight_scale: Tensor | None,
    input_bits: int,
    weight_bits: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The layer's result, as its inference twin computes it; and where the product is of int8, `weight_integers`.

    weight: its rows `[N, K]`.
    """
    bias = None if bias is None else bias.float()
    if input_bits == 1:
        return geometry.binary(x, geometry.sign_bits(weight), kk.binarize_rows(weight)[1], bias), None, None
    integers, scale = weight_integers(weight, weight_scale, weight_bits)
    packed = kk.pack_int8_weight(geometry.kernel_order(integers))
    if input_scale is None or zero_point is None:
        return geometry.int8(x, packed, scale, bias), integers, scale
    grid: Any = {"input_scale": input_scale, "input_zero_point": zero_point, "input_quant_max": 2**input_bits - 1}
    return geometry.int8(x, packed, scale, bias, **grid), integers, scale


def input_backward_(
    grad: Tensor, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int
) -> tuple[Tensor | None, Tensor | None]:
    """Turns the gradient of `fake_input` into that of x, in place; returns those of scale and zero point."""
    if bits == 1:
        torch.ops.kdq.binarize_rows_backward_(grad, x, False)
    if scale is None or zero_point is None:
        return None, None
    quant_max = 2**bits - 1
    grad_scale, grad_zero_point = torch.ops.kdq.fake_quantize_backward_(grad, x, scale, zero_point, 0, quant_max)
    factor = gradient_factor(x.shape[-1], quant_max)
    return grad_scale.mul_(factor), grad_zero_point.mul_(factor)


def weight_backward_(grad: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> Tensor | None:
    """Turns the gradient of `fake_weight` into that of weight, in place; returns that of scale."""
    if bits == 1:
        torch.ops.kdq.binarize_rows_backward_(grad, weight, True)
    if scale is None:
        return None
    quant_min, quant_max = weight_range(bits)
    grad_scale: Tensor = torch.ops.kdq.fake_quantize_backward_(grad, weight, scale, None, quant_min, quant_max, 0)[0]
    return grad_scale.mul_(gradient_factor(weight.shape[1], quant_max))


def through_magnitude_(grad: Tensor | None, parameter: Tensor | None) -> None:
    """Turns the gradient of a `learned_scale` into that of its parameter, in place."""
    if grad is not None and parameter is not None:
        grad.mul_(parameter.sign())


class _Product(torch.autograd.Function):
    """`kernel_product` on learned parameters; differentiable, once, in all tensors."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, bias, input_parameter, zero_point, weight_parameter, geometry, ctx.input_bits, ctx.weight_bits = args
        ctx.geometry = geometry
        ctx.bias_dtype = None if bias is None else bias.dtype
        input_scale = None if input_parameter is None else learned_scale(input_parameter)
        integer = None if zero_point is None else integer_zero_point(zero_point, ctx.input_bits)
        weight_scale = None if weight_parameter is None else learned_scale(weight_parameter)
        y, integers, scale = kernel_product(
            x, weight.flatten(1), bias, geometry, input_scale, integer, weight_scale, ctx.input_bits, ctx.weight_bits
        )
        ctx.save_for_backward(x, weight, integers, scale, input_parameter, weight_parameter, input_scale, integer)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, integers, scale, input_parameter, weight_parameter, input_scale, zero_point = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_input_scale, needs_zero_point, needs_weight_scale, *_ = (
            ctx.needs_input_grad
        )
        geometry, weight_rows = ctx.geometry, weight.flatten(1)
        grad = geometry.dense(grads[0])
        rounded: Tensor | None = None
        grad_x = grad_input_scale = grad_zero_point = grad_weight = grad_weight_scale = None
        if needs_x or needs_input_scale or needs_zero_point:
            # Where there are integers, a quarter of the bytes of the float weight are read.
            rounded = fake_weight(weight_rows, None, 1) if integers is None else kk.dequantize(integers, scale, axis=0)
            rounded = rounded.to(grad.dtype)
            grad_rows = geometry.as_rows(geometry.input_gradient(grad, rounded, x), x)
            grad_input_scale, grad_zero_point = input_backward_(
                grad_rows, geometry.as_rows(x, x), input_scale, zero_point, ctx.input_bits
            )
            grad_x = geometry.from_rows(grad_rows, x)
            through_magnitude_(grad_input_scale, input_parameter)
        if needs_weight or needs_weight_scale:
            inputs = fake_input(geometry.as_rows(x, x), input_scale, zero_point, ctx.input_bits)
            grad_weight = geometry.weight_gradient(grad, geometry.from_rows(inputs, x), rounded).to(weight.dtype)
            learned = None if weight_parameter is None else scale
            grad_weight_scale = weight_backward_(grad_weight, weight_rows, learned, ctx.weight_bits)
            grad_weight = grad_weight.view(weight.shape)
            through_magnitude_(grad_weight_scale, weight_parameter)
        grad_bias = geometry.bias_gradient(grad).to(ctx.bias_dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad_input_scale, grad_zero_point, grad_weight_scale, None, None, None


def quantized_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    input_bits: int,
    weight_bits: int,
    input_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """The layer of x and weight, in their shapes by the geometry, both rounded; in the dtype of x (under autocast in
    its dtype).

    Args:
        input_scale, zero_point: 0-d parameters of the activations' grid (LSQ+, Bhalgat et al. 2020), or both None.
        weight_scale: parameter `[N]` (LSQ), or None.

    Differentiable once: a gradient of the gradient (`create_graph=True`) raises.

    Raises:
        ValueError: an 8-bit weight or a learned scale is NaN or infinite, as after a step that diverged; or x has
            another shape.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    batched = geometry.batched(x)
    y: Tensor = _Product.apply(
        batched, weight, bias, input_scale, zero_point, weight_scale, geometry, input_bits, weight_bits
    )
    return y if batched.dim() == x.dim() else y.squeeze(0)
