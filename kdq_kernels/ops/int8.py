"""Products, linear layers and convolutions of int8 weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdq_kernels._torch_library.calls import operators
from kdq_kernels.ops.arguments import Pair, as_tensor

_ops = torch.ops.kdq


def pack_int8_weight(w: Tensor, bits: int = 8) -> Tensor:
    """w int8 `[N, K]` -> an opaque blob, uint8 `[N, ...]`, in the order that this machine's kernels read.

    With `bits` 4 or 2, values from `-2**(bits - 1)` to `2**(bits - 1) - 1` take that many bits in memory, which with
    few rows of x is what takes the time; `int8_linear` and `int8_conv2d` give the same results as from 8 bits, and the
    others refuse them.

    Not for storage: keep w and pack again after loading, after `set_isa`, or on another device. On a GPU the kernels
    read row-major int8, and the result is a copy of w whatever the bits; what was packed on the CPU is refused there,
    and vice versa.
    """
    return _ops.pack_int8_weight(w, bits)


def unpack_int8_weight(packed: Tensor) -> Tensor:
    """The inverse of `pack_int8_weight`: int8 `[N, K]`."""
    return _ops.unpack_int8_weight(packed)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a int8 `[M, K]` @ b.T -> int32 `[M, N]`, exact for every int8 value; b int8 `[N, K]` or packed.

    Raises:
        ValueError: the K of a and b differ, or K > 131071, where int32 sums could overflow.
    """
    return operators().int8_matmul(a, b)


def int8_linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | float | None = None,
    input_zero_point: Tensor | int | None = None,
    input_quant_max: int = 255,
    activation: str | None = None,
) -> Tensor:
    """A linear layer on integer kernels: float in, float out, in the dtype of x.

    Quantizes the rows of x, multiplies exactly in int32, and applies `acc * row_scale * weight_scale + bias` and the
    activation before the result is first written. For inference: no gradient, which the layers of `kdq` give.

    Args:
        x: `[..., K]`.
        packed: `pack_int8_weight(w)` of w `[N, K]`.
        weight_scale: float32 `[N]`, one scale an output channel.
        bias: float32 `[N]`.
        input_scale: None quantizes each row dynamically (`quantize_rows`; K at most 131071). A number or one-element
            tensor (on the CPU, or where x is) quantizes statically to unsigned integers `[0, input_quant_max]` (K at
            most 65535).
        input_zero_point: of the static grid; None: its middle, `(input_quant_max + 1) // 2`.
        input_quant_max: 255 for 8-bit activations, `2**bits - 1` for fewer bits.
        activation: None, "relu", "gelu" (erf form) or "silu".

    Returns:
        `[..., N]`. A row of x with NaN (or, dynamically, inf) gives NaN in that row alone.
    """
    if input_scale is not None or input_zero_point is not None:
        input_scale = as_tensor(input_scale, torch.float32)
        input_zero_point = as_tensor(input_zero_point, torch.int32)
    return operators().int8_linear(
        x, packed, weight_scale, bias, input_scale, input_zero_point, input_quant_max, activation
    )


def int8_linear_chain(
    x: Tensor,
    packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    *,
    input_scale: Sequence[Tensor | None] | None = None,
    input_zero_point: Sequence[Tensor | None] | None = None,
    input_quant_max: Sequence[int] | None = None,
    activation: Sequence[str | None] | None = None,
) -> Tensor:
    """`int8_linear` several times, each on the result of the one before, in one call: a small layer's call takes longer
    than its kernel.

    Args:
        x: `[..., K]` of the first layer.
        packed, weight_scale, bias, ...: one for each layer, as `int8_linear` takes them; scales and zero points of
            activations are tensors. None for all: dynamic activations, 255, no activation function.

    Returns:
        `[..., N]` of the last layer, the bits that the calls one by one would give.
    """
    return operators().int8_linear_chain(
        x,
        packed,
        weight_scale,
        bias,
        [] if input_scale is None else input_scale,
        [] if input_zero_point is None else input_zero_point,
        [] if input_quant_max is None else input_quant_max,
        [] if activation is None else [name or "" for name in activation],
    )


def int8_weight_only_linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """As `int8_linear`, but x stays in floating point: weights are widened in registers, sums are float32."""
    return operators().int8_weight_only_linear(x, packed, weight_scale, bias, activation)


def int8_conv2d(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    input_scale: Tensor | float | None = None,
    input_zero_point: Tensor | int | None = None,
    input_quant_max: int = 255,
    activation: str | None = None,
) -> Tensor:
    """A 2d convolution on integer kernels: float in, float out, in the dtype of x; zero padding, one group.

    Each image is quantized once; the windows of the kernel are gathered a tile at a time, never all at once.

    Args:
        x: `[images, C, H, W]`. In the channels_last memory format it is not copied.
        packed: `pack_int8_weight(w.permute(0, 2, 3, 1).flatten(1))` of w `[N, C, kernel height, kernel width]`, at most
            65535 values an output channel.
        weight_scale: float32 `[N]`, one scale an output channel.
        bias: float32 `[N]`.
        kernel_size, stride, padding, dilation: (of the height, of the width), as in `torch.nn.Conv2d`.
        input_scale: None quantizes dynamically, symmetric, with one scale an image, `max|x| / 127` (the integers of
            `quantize_rows(x.flatten(1))`). A number or one-element tensor quantizes statically, as in `int8_linear`.
        input_zero_point, input_quant_max, activation: as in `int8_linear`.

    Returns:
        `[images, N, output height, output width]`, channels_last if x is (and not contiguous too), else contiguous. An
        image with NaN (or, dynamically, inf) gives NaN in all of its outputs, and in no others.
    """
    grid = as_tensor(input_scale, torch.float32), as_tensor(input_zero_point, torch.int32)
    return operators().int8_conv2d(
        x,
        packed,
        weight_scale,
        bias,
        kernel_size,
        stride,
        padding,
        dilation,
        *grid,
        input_quant_max,
        activation,
    )
