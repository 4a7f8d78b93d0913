"""Contenders for the gradients of fake-quant with learned scales (LSQ): the backward operator alone, and forward and
backward through autograd, as a training step calls them.

The limit is the copy bandwidth: backward reads x and the gradient and writes the gradient of x; forward comes on top.
The scale's gradient is what is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import kdq_kernels as kk
from kdq.bench.case import Case, Contender
from kdq.bench.fake_quant import (
    MILLION,
    QMAX,
    QMIN,
    QUICK_SIZES,
    SCALE,
    SIXTEEN,
    learnable_channel,
    learnable_tensor,
)
from kdq.bench.limits import copying
from kdq.bench.target import Target

AXES = {"per tensor": None, "axis 0": 0}
learnable_tensor_backward = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward
learnable_channel_backward = torch.ops.aten._fake_quantize_learnable_per_channel_affine_backward


def inputs(target: Target) -> Iterator[tuple[str, Tensor, Tensor, Tensor, int | None]]:
    """Shape, x, gradient of y, scale, axis of each case."""
    generator = target.generator(5)
    for size in QUICK_SIZES if target.quick else [MILLION, SIXTEEN]:
        x, grad = (torch.randn(size, generator=generator, device=target.device) for _ in range(2))
        for kind, axis in AXES.items():
            scale = torch.full((1 if axis is None else size[axis],), SCALE, device=target.device)
            yield f"{size[0]}x{size[1]} {kind}", x, grad, scale, axis


def fake_quantize_backward_cases(target: Target) -> Iterator[Case]:
    """Gradients of x, scale and zero point from one pass."""
    for shape, x, grad, scale, axis in inputs(target):
        zero_point = torch.zeros_like(scale)
        contenders = [
            Contender("kdq backward", our_backward(grad, x, scale, zero_point, axis), "ours", 1e-3),
            Contender("torch learnable backward", torch_backward(grad, x, scale, zero_point, axis), "peer", 1e-2),
        ]
        reference = reference_grad_scale(grad, x, scale, axis)
        yield Case("fake_quantize_backward", shape, [copying(3.0 * 4 * x.numel())], reference, contenders)


def fake_quantize_training_cases(target: Target) -> Iterator[Case]:
    """Forward and backward."""
    for shape, x, grad, scale, axis in inputs(target):
        with torch.inference_mode(False):
            x, grad, scale = x.clone().requires_grad_(), grad.clone(), scale.clone().requires_grad_()
            contenders = [
                Contender("kdq forward and backward", training(our_forward(axis), x, scale, grad), "ours", 1e-3),
                Contender("torch learnable", training(torch_forward(scale, axis), x, scale, grad), "peer", 1e-2),
            ]
        reference = reference_grad_scale(grad, x.detach(), scale.detach(), axis)
        yield Case("fake_quantize_training", shape, [copying(5.0 * 4 * x.numel())], reference, contenders)


def reference_grad_scale(grad: Tensor, x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """In float64: sum of grad * (q - x / scale) inside the grid, grad * q outside."""
    step = scale[:, None]
    unclamped = torch.round(x * (1 / step)).double()
    q = unclamped.clamp(QMIN, QMAX)
    terms = grad.double() * torch.where(q == unclamped, q - x.double() / step.double(), q)
    return terms.sum().reshape(1) if axis is None else terms.sum(1)


def our_backward(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Callable[[], Tensor]:
    backward = torch.ops.kdq.fake_quantize_backward
    return lambda: backward(grad, x, scale, zero_point, QMIN, QMAX, axis, None)[1]


def torch_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None
) -> Callable[[], Tensor]:
    if axis is None:
        return lambda: learnable_tensor_backward(grad, x, scale, zero_point, QMIN, QMAX)[1]
    return lambda: learnable_channel_backward(grad, x, scale, zero_point, axis, QMIN, QMAX)[1]


def our_forward(axis: int | None) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(kk.fake_quantize, quant_min=QMIN, quant_max=QMAX, axis=axis)


def torch_forward(scale: Tensor, axis: int | None) -> Callable[[Tensor, Tensor], Tensor]:
    zero_point = torch.zeros_like(scale)
    if axis is None:
        return lambda x, s: learnable_tensor(x, s, zero_point, QMIN, QMAX)
    return lambda x, s: learnable_channel(x, s, zero_point, axis, QMIN, QMAX)


def training(
    forward: Callable[[Tensor, Tensor], Tensor], x: Tensor, scale: Tensor, grad: Tensor
) -> Callable[[], Tensor]:
    """Forward, then the gradients of x and scale; returns the scale's."""

    def run() -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(forward(x, scale), (x, scale), grad)[1]

    return run
