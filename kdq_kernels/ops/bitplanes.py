"""Products and linear layers of integers of few bits, as planes of bits."""

from __future__ import annotations

import torch
from torch import Tensor

from kdq_kernels._torch_library.calls import operators
from kdq_kernels.ops.arguments import as_tensor

_ops = torch.ops.kdq


def pack_bitplanes(q: Tensor, bits: int, form: str = "signed") -> Tensor:
    """Integers of few bits as planes of bits: q `[..., K]` -> int64 `[bits, ..., ceil(K / 64)]`.

    Plane p has bit p of the code of every element, in the order of `pack_signs`; tail bits are zero. Portable: the same
    on every instruction set and device.

    Args:
        q: uint8 for "unsigned", else int8.
        bits: 1 to 8; 1 to 7 for "odd".
        form: "unsigned": integers from 0 to `2**bits - 1`, which are their codes. "signed": from `-2**(bits - 1)` to
            `2**(bits - 1) - 1`, code `q + 2**(bits - 1)`. "odd": odd integers from `-(2**bits - 1)` to `2**bits - 1`,
            code `(2**bits - 1 - q) / 2`; of one bit ±1 as `pack_signs` packs it.

    Raises:
        ValueError: an argument is wrong, or (on the CPU) an integer is none of the form.
    """
    return _ops.pack_bitplanes(q, bits, form)


def unpack_bitplanes(planes: Tensor, k: int, form: str = "signed") -> Tensor:
    """The inverse of `pack_bitplanes`: int8, or uint8 for "unsigned", `[..., k]`."""
    return _ops.unpack_bitplanes(planes, k, form)


def bitplane_matmul(
    a_planes: Tensor, b_planes: Tensor, k: int, *, a_form: str = "unsigned", b_form: str = "signed"
) -> Tensor:
    """a_planes `[P, M, W]`, b_planes `[Q, N, W]` -> `a @ b.T` of their integers, int32 `[M, N]`, exact.

    `P * Q` products of bits by xor and popcount (Zhou et al. 2016, DoReFa-Net; Umuroglu et al. 2018, BISMO).

    Raises:
        ValueError: an argument is wrong, or `2 * k * max|a| * max|b|` does not fit int32.
    """
    return _ops.bitplane_matmul(a_planes, b_planes, k, a_form, b_form)


def bitplane_linear(
    x: Tensor,
    weight_planes: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | float,
    input_zero_point: Tensor | int | None = None,
    input_quant_max: int,
    weight_form: str = "signed",
    activation: str | None = None,
) -> Tensor:
    """`int8_linear` of few bits on a static grid, by `bitplane_matmul`: the same integers, sums and results to the last
    bit, as long as input_scale and its products with weight_scale are at least 2^-120 and finite.

    With one bit of weights and two of activations it takes a fraction of the time where the CPU counts bits in vectors
    (AVX-512 VPOPCNTDQ).

    Args:
        x: `[..., K]`; its rows are quantized inside, in as many planes as `input_quant_max` has bits.
        weight_planes: `pack_bitplanes(w, bits, weight_form)` of w int8 `[N, K]`.
        weight_sum: int32 `[N]`: `w.sum(1)`.
        weight_scale, bias: float32 `[N]`.
        input_scale, input_zero_point, input_quant_max, activation: as in `int8_linear`.

    Returns:
        `[..., N]` in the dtype of x. A row of x with NaN gives NaN in that row alone.

    Raises:
        ValueError: an argument is wrong, or sums could overflow.
    """
    return operators().bitplane_linear(
        x,
        weight_planes,
        weight_sum,
        weight_scale,
        bias,
        as_tensor(input_scale, torch.float32),
        as_tensor(input_zero_point, torch.int32),
        input_quant_max,
        weight_form,
        activation,
    )
