"""The kernels on torch tensors: thin, typed faces of `torch.ops.kdq.*`.

x is float32, bfloat16 or float16, of any strides; scales are float32. All tensors of a call are on one device, the CPU
or, where the build has those operators, a CUDA GPU. Wrong shapes, dtypes or values raise `ValueError` naming the
argument, what came and what was expected; values in a GPU's memory are not looked at, as that would wait for it. All
functions work under `torch.compile(fullgraph=True)` and stay `kdq.*` nodes in `torch.export`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor

from kdq_kernels import _torch_library as _torch_library  # registers torch.ops.kdq

_ops = torch.ops.kdq
# Of the layers' operators, the overloads themselves: looking one up takes as long as a small layer's product.
_int8_linear = _ops.int8_linear.default
_int8_linear_chain = _ops.int8_linear_chain.default
_int8_weight_only_linear = _ops.int8_weight_only_linear.default
_int8_conv2d = _ops.int8_conv2d.default
_binary_conv2d = _ops.binary_conv2d.default
_binary_linear = _ops.binary_linear.default
_binary_threshold = _ops.binary_threshold.default
_scaled_dot_product_attention = _ops.scaled_dot_product_attention.default
_bitplane_linear = _ops.bitplane_linear.default
_codebook_linear = _ops.codebook_linear.default


Pair: TypeAlias = tuple[int, int]


def _tensor(value: Tensor | float | None, dtype: torch.dtype, like: Tensor | None = None) -> Tensor | None:
    """A number as a 0-d tensor, on the device of `like` or the CPU; tensors and None as they are."""
    if value is None or type(value) is Tensor:  # first: the common cases of a call that takes a microsecond or two
        return value
    if not isinstance(value, int | float):
        return value
    if like is None or like.is_cpu:
        return torch.tensor(value, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=like.device)  # a kernel, where torch.tensor would wait for the GPU


def _scale(scale: Tensor | float, x: Tensor) -> Tensor:
    return cast(Tensor, _tensor(scale, torch.float32, x))


def _zero_point(zero_point: Tensor | float | None, x: Tensor) -> Tensor | None:
    """int64 tensors, which torch's own quantizers accept, become int32; a Python float is a learned zero point."""
    if isinstance(zero_point, Tensor):
        return zero_point.to(torch.int32) if zero_point.dtype == torch.int64 else zero_point
    return _tensor(zero_point, torch.int32 if isinstance(zero_point, int) else torch.float32, x)


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
    scale, zero_point = _scale(scale, x), _zero_point(zero_point, x)
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
    return _ops.quantize(x, _scale(scale, x), _zero_point(zero_point, x), quant_min, quant_max, axis, group_size)


def dequantize(
    q: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float | None = None,
    *,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """`(q - zero_point) * scale` in float32, for q int8, uint8 or int32."""
    return _ops.dequantize(q, _scale(scale, q), _zero_point(zero_point, q), axis, group_size)


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
    return _ops.int8_matmul(a, b)


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
    activation before the result is first written.

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
    is_plain = activation is None and input_quant_max == 255  # each argument that is passed costs 100 ns
    if is_plain and input_scale is None and input_zero_point is None:
        return _int8_linear(x, packed, weight_scale, bias)
    grid = _tensor(input_scale, torch.float32), _tensor(input_zero_point, torch.int32)
    if is_plain:
        return _int8_linear(x, packed, weight_scale, bias, *grid)
    return _int8_linear(x, packed, weight_scale, bias, *grid, input_quant_max, activation)


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
    return _int8_linear_chain(
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
    return _int8_weight_only_linear(x, packed, weight_scale, bias, activation)


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
    grid = _tensor(input_scale, torch.float32), _tensor(input_zero_point, torch.int32)
    return _int8_conv2d(
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


def pack_signs(x: Tensor) -> Tensor:
    """x `[..., K]` -> sign bits, int64 `[..., ceil(K / 64)]`.

    Element i is bit i % 64 of word i // 64; a set bit means -1; sign(0) = sign(-0.0) = sign(NaN) = +1. Tail bits
    are zero.
    """
    return _ops.pack_signs(x)


def unpack_signs(bits: Tensor, k: int) -> Tensor:
    """Sign bits `[..., ceil(k / 64)]` -> ±1, float32 `[..., k]`."""
    return _ops.unpack_signs(bits, k)


def binary_matmul(a_bits: Tensor, b_bits: Tensor, k: int) -> Tensor:
    """Dot products of ±1 vectors by xor and popcount: a_bits `[M, W]`, b_bits `[N, W]` -> int32 `[M, N]`, exact.

    `dot = k - 2 * popcount(a xor b)` (Courbariaux et al. 2016).
    """
    return _ops.binary_matmul(a_bits, b_bits, k)


def binary_linear(
    x: Tensor, weight_bits: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, k: int | None = None
) -> Tensor:
    """x `[..., K]` -> `sign(x) @ sign(w).T * weight_scale + bias`, `[..., N]`, in the dtype of x.

    The signs of x are packed inside. weight_bits int64 `[N, ceil(K / 64)]`; weight_scale float32 `[N]`: XNOR-Net's
    alpha, the mean magnitude of the channel's weights (Rastegari et al. 2016). With `k`, the number of features, x may
    be packed signs, int64 `[..., ceil(k / 64)]`; the result is then float32.
    """
    if k is None:
        return _binary_linear(x, weight_bits, weight_scale, bias)  # each argument that is passed costs 100 ns
    return _binary_linear(x, weight_bits, weight_scale, bias, k)


def binary_conv2d(
    x: Tensor,
    weight_bits: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """A 2d convolution of signs by xor and popcount: `conv2d(sign(x), sign(w)) * weight_scale + bias`, of one group
    (XNOR-Net, Rastegari et al. 2016).

    Padding counts as 0, as in the float layer, although there is no 0 among signs: what the bits of padding add to a
    sum is subtracted again, exactly.

    Args:
        x: `[images, C, H, W]`. In the channels_last memory format it is not copied.
        weight_bits: int64 `[N, kernel height, kernel width, ceil(C / 64)]`: `pack_signs(w.permute(0, 2, 3, 1))` of w
            `[N, C, kernel height, kernel width]`.
        weight_scale: float32 `[N]`.
        bias: float32 `[N]`.
        stride, padding, dilation: (of the height, of the width), as in `torch.nn.Conv2d`.

    Returns:
        `[images, N, output height, output width]`, in dtype and memory format as of `int8_conv2d`.
    """
    return _binary_conv2d(x, weight_bits, weight_scale, bias, stride, padding, dilation)


def binary_threshold(x: Tensor, weight_bits: Tensor, threshold: Tensor, *, k: int | None = None) -> Tensor:
    """A binary layer from bits to bits: int64 `[..., ceil(N / 64)]`, bit n set, which means -1, where
    `sign(x) @ sign(w[n]) < threshold[n]`.

    Batch norm and sign of an integer are a comparison with an integer, so that hidden layers need no floats (Hubara et
    al., "Quantized Neural Networks: Training Neural Networks with Low Precision Weights and Activations", 2016);
    `kdq.fold_binary_chain_` finds the thresholds. Where the norm's factor is negative, invert the channel's weight
    bits, which negates its dot product. The dot products are exact, and never in memory all at once.

    Args:
        x: packed signs, int64 `[..., ceil(k / 64)]`, with `k`, the number of features; or values `[..., K]`, whose
            signs are packed inside.
        weight_bits: int64 `[N, ceil(K / 64)]`.
        threshold: int32 `[N]`, any values: at most -K, and a channel is always +1; more than K, and it is always -1.
    """
    return _binary_threshold(x, weight_bits, threshold, k)


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
    return _bitplane_linear(
        x,
        weight_planes,
        weight_sum,
        weight_scale,
        bias,
        _tensor(input_scale, torch.float32),
        _tensor(input_zero_point, torch.int32),
        input_quant_max,
        weight_form,
        activation,
    )


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """Indices uint8 `[N, K]`, below `2**bits`, bits from 1 to 5 -> int32 `[ceil(N / 16), ceil(K / p), 16]`.

    The index of channel c and input i is in panel c // 16, word i // p, lane c % 16, from bit i % p * bits on, where
    `p = 32 // bits`. All other bits are zero. The same on every machine, so it may be stored.
    """
    return _ops.pack_indices(indices, bits)


def unpack_indices(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The inverse of `pack_indices`: uint8 `[n, k]`."""
    return _ops.unpack_indices(packed, bits, n, k)


def codebook_linear(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """A linear layer whose weights are indices of a few centroids, which the kernels look up in registers.

    Han, Mao, Dally: Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman
    Coding, 2016 (weight sharing). Products and sums are float32.

    Args:
        x: `[..., K]`.
        packed: `pack_indices(indices, bits)` of indices `[out_features, K]`.
        codebook: float32 `[2**bits]`, finite, bits from 1 to 5.
        bias: float32 `[out_features]`.
        activation: None, "relu", "gelu" (erf form) or "silu".

    Returns:
        `[..., out_features]`: `activation(x @ codebook[indices].T + bias)`, in the dtype of x.
    """
    if activation is None:
        return _codebook_linear(x, packed, codebook, out_features, bias)
    return _codebook_linear(x, packed, codebook, out_features, bias, activation)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`softmax(scale * query @ key.T + mask) @ value`, as `torch.nn.functional.scaled_dot_product_attention`, for
    inference: without dropout, and without a gradient.

    Vaswani et al.: Attention Is All You Need, 2017. In float32 inside, a block of keys at a time (Dao et al.:
    FlashAttention, 2022); on CUDA tensors torch's own kernels do it. Operands are read where they are if their last
    axis is dense, as are the parts of a joint projection; the result lies with the heads of a query side by side, so
    that `y.transpose(1, 2).flatten(2)` copies nothing.

    Args:
        query: `[batch, heads, queries, size]`.
        key, value: `[batch, kv heads, keys, size]` and `[..., value size]`, in the dtype of query. kv heads divides
            heads: each serves heads / kv heads of the queries' in turn (grouped-query attention).
        attn_mask: `[batch, heads, queries, keys]`, of the first three axes any may be 1: float32, added to the scores,
            or bool, True where a key takes part. A query that no key takes part for gets zeros.
        is_causal: query i takes the keys up to i, beside the mask.
        scale: `size ** -0.5` if None.

    Returns:
        `[batch, heads, queries, value size]`, in the dtype of query.
    """
    if scale is None:
        scale = max(query.shape[-1], 1) ** -0.5
    return _scaled_dot_product_attention(query, key, value, attn_mask, is_causal, scale)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float,
    alpha: float,
) -> Tensor:
    """`alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) cross_entropy(student, target)`.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015. One pass over the logits forward and one
    backward, in float32 inside; nothing of their size is stored but the gradient. Differentiable in student_logits,
    once; the teacher is a constant.

    Args:
        student_logits, teacher_logits: `[..., C]`, of one dtype. Classes that the teacher rules out (logit -inf) count
            0, whatever the student says.
        target: int64 class indices `[...]`; may be left out if alpha is 1. Rows with -100 are left out of both terms.
        temperature: T, positive.
        alpha: share of the teacher, 0 to 1.

    Returns:
        float32 0-d: the mean over the rows that are not left out, 0 if there are none.

    Raises:
        ValueError: a shape, dtype or value is wrong, a target is no class index, or it is missing.
    """
    return _ops.distillation_loss(student_logits, teacher_logits, target, temperature, alpha)[0]
