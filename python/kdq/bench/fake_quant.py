"""Contenders for fake-quant, forward and backward: torch's four operators and the compiled composition of plain ops.

The limit is the copy bandwidth: forward reads x and writes y, backward reads x and the gradient and writes the
gradient of x. Our forward is shown with a fresh and with a reused output, since page faults of fresh memory cost more
than the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import kdq_kernels as kk
from kdq.bench.case import Case, Contender

QMIN, QMAX, SCALE = -128, 127, 0.02
ROWS = 1024
learnable_tensor = torch.ops.aten._fake_quantize_learnable_per_tensor_affine
learnable_channel = torch.ops.aten._fake_quantize_learnable_per_channel_affine
learnable_tensor_backward = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward
learnable_channel_backward = torch.ops.aten._fake_quantize_learnable_per_channel_affine_backward


def composed(x: Tensor, scale: Tensor) -> Tensor:
    """Symmetric fake-quant from plain torch ops, for torch.compile. scale broadcasts against x."""
    return torch.clamp(torch.round(x * (1 / scale)), QMIN, QMAX) * scale


def compiled_composition(x: Tensor, scale: Tensor) -> Callable[[], Tensor]:
    function = torch.compile(composed, dynamic=False)
    return lambda: function(x, scale)


def sizes(quick: bool) -> list[int]:
    """Columns of x [1024, columns]: 64k, or 1M and 16M elements."""
    return [64] if quick else [1024, 16384]


def fake_quantize_cases(quick: bool) -> Iterator[Case]:
    """Forward, per tensor and per channel (axis 0)."""
    generator = torch.Generator().manual_seed(4)
    for columns in sizes(quick):
        x = torch.randn(ROWS, columns, generator=generator)
        out = torch.empty_like(x)
        work = 2.0 * 4 * x.numel()
        one, zero = torch.tensor([SCALE]), torch.tensor([0], dtype=torch.int32)
        reference = torch.clamp(torch.round(x * (1 / one)), QMIN, QMAX) * one
        contenders = [
            Contender("kdq, reused output", _ours(x, one, None, out), "ours"),
            Contender("kdq, fresh output", _ours(x, one, None, None), "ours"),
            Contender(
                "torch per_tensor",
                partial(torch.fake_quantize_per_tensor_affine, x, SCALE, 0, QMIN, QMAX),
                tolerance=1e-6,
            ),
            Contender(
                "torch learnable per_tensor",
                partial(learnable_tensor, x, one, zero.float(), QMIN, QMAX),
                tolerance=1e-6,
            ),
        ]
        if not quick:
            contenders.append(Contender("torch.compile", compiled_composition(x, one), tolerance=1e-6))
        shape = f"{ROWS}x{columns}"
        yield Case("fake_quantize", f"{shape} per tensor", work, "copy_gbps", reference, contenders)

        scale = torch.rand(ROWS, generator=generator) * SCALE + SCALE
        zeros = torch.zeros(ROWS, dtype=torch.int32)
        reference = composed(x, scale[:, None])
        contenders = [
            Contender("kdq, reused output", _ours(x, scale, 0, out), "ours"),
            Contender("kdq, fresh output", _ours(x, scale, 0, None), "ours"),
            Contender(
                "torch per_channel",
                partial(torch.fake_quantize_per_channel_affine, x, scale, zeros, 0, QMIN, QMAX),
                tolerance=1e-6,
            ),
            Contender(
                "torch learnable per_channel",
                partial(learnable_channel, x, scale, zeros.float(), 0, QMIN, QMAX),
                tolerance=1e-6,
            ),
        ]
        if not quick:
            contenders.append(Contender("torch.compile", compiled_composition(x, scale[:, None]), tolerance=1e-6))
        yield Case("fake_quantize", f"{shape} per channel", work, "copy_gbps", reference, contenders)


def _ours(x: Tensor, scale: Tensor, axis: int | None, out: Tensor | None) -> Callable[[], Tensor]:
    return lambda: kk.fake_quantize(x, scale, quant_min=QMIN, quant_max=QMAX, axis=axis, out=out)


def fake_quantize_backward_cases(quick: bool) -> Iterator[Case]:
    """Gradients of x, scale and zero point (LSQ) from one pass. The scale's gradient is what is checked."""
    generator = torch.Generator().manual_seed(5)
    for columns in sizes(quick):
        x = torch.randn(ROWS, columns, generator=generator)
        grad = torch.randn(ROWS, columns, generator=generator)
        work = 3.0 * 4 * x.numel()
        shape = f"{ROWS}x{columns}"
        for kind, axis in (("per tensor", None), ("per channel", 0)):
            channels = 1 if axis is None else ROWS
            scale = torch.full((channels,), SCALE)
            zero_point = torch.zeros(channels)
            reference = reference_grad_scale(grad, x, scale, axis)
            contenders = [
                Contender("kdq backward", _ours_backward(grad, x, scale, zero_point, axis), "ours", 1e-3),
                Contender(
                    "torch learnable backward",
                    _torch_backward(grad, x, scale, zero_point, axis),
                    "peer",
                    1e-2,
                ),
            ]
            yield Case("fake_quantize_backward", f"{shape} {kind}", work, "copy_gbps", reference, contenders)


def reference_grad_scale(grad: Tensor, x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """In float64: sum of grad * (q - x / scale) inside the grid, grad * q outside."""
    step = scale[:, None]
    unclamped = torch.round(x * (1 / step)).double()
    q = unclamped.clamp(QMIN, QMAX)
    terms = grad.double() * torch.where(q == unclamped, q - x.double() / step.double(), q)
    return terms.sum().reshape(1) if axis is None else terms.sum(1)


def _ours_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None
) -> Callable[[], Tensor]:
    backward = torch.ops.kdq.fake_quantize_backward
    return lambda: backward(grad, x, scale, zero_point, QMIN, QMAX, axis, None)[1]


def _torch_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None
) -> Callable[[], Tensor]:
    if axis is None:
        return lambda: learnable_tensor_backward(grad, x, scale, zero_point, QMIN, QMAX)[1]
    return lambda: learnable_channel_backward(grad, x, scale, zero_point, axis, QMIN, QMAX)[1]
