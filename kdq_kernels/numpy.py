"""The kernels on NumPy arrays: the functions of `kdq_kernels`, with the same names and arguments, without torch.

Arrays are float32 or float16; C-contiguous ones are read in place, others are copied first. The GIL is released while
a kernel runs, on the library's own thread pool (`num_threads`, `set_num_threads`). Wrong arguments raise `ValueError`
naming the argument, what came and what was expected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdq_kernels import _C

Floats = NDArray[Any]
Ints = NDArray[Any]
Scale = NDArray[np.float32] | float
ZeroPoint = NDArray[Any] | int | float | None
Pair = tuple[int, int]

__all__ = [
    "binarize_rows",
    "binary_conv2d",
    "binary_linear",
    "binary_matmul",
    "bitplane_linear",
    "bitplane_matmul",
    "codebook_linear",
    "dequantize",
    "distillation_loss",
    "distillation_loss_gradient",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_rows",
    "int8_conv2d",
    "int8_linear",
    "int8_matmul",
    "int8_weight_only_linear",
    "num_threads",
    "pack_bitplanes",
    "pack_indices",
    "pack_int8_weight",
    "pack_signs",
    "quantize",
    "quantize_rows",
    "scaled_dot_product_attention",
    "set_num_threads",
    "unpack_bitplanes",
    "unpack_indices",
    "unpack_int8_weight",
    "unpack_signs",
]

num_threads = _C.num_threads
set_num_threads = _C.set_num_threads


def _scale_array(scale: Scale) -> NDArray[np.float32]:
    """A Python number is a per-tensor scale; arrays are taken as they are."""
    return np.asarray(scale, dtype=np.float32) if isinstance(scale, int | float) else scale


def _zero_point_array(zero_point: ZeroPoint) -> NDArray[Any] | None:
    if isinstance(zero_point, int | float):
        return np.asarray(zero_point, dtype=np.int32 if isinstance(zero_point, int) else np.float32)
    return zero_point


def fake_quantize(
    x: Floats,
    scale: Scale,
    zero_point: ZeroPoint = None,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
    out: Floats | None = None,
) -> Floats:
    """`(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale`, like x.

    `scale` (float32) and `zero_point` (int32, or float32, then rounded half-to-even) have one element (per tensor), the
    size of `axis` (per channel), or shape `[..., K / group_size]` for x `[..., K]` (per group). `out`: a C-contiguous
    array like x that receives the result; it may be x.
    """
    return _C.fake_quantize(
        x, _scale_array(scale), _zero_point_array(zero_point), quant_min, quant_max, axis, group_size, out
    )


def fake_quantize_backward(
    grad: Floats,
    x: Floats,
    scale: Scale,
    zero_point: ZeroPoint = None,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> tuple[Floats, NDArray[np.float32], NDArray[np.float32]]:
    """Straight-through gradients with respect to x, scale and zero_point (LSQ, Esser et al. 2020; LSQ+, Bhalgat et
    al. 2020)."""
    return _C.fake_quantize_backward(
        grad, x, _scale_array(scale), _zero_point_array(zero_point), quant_min, quant_max, axis, group_size
    )


def quantize(
    x: Floats,
    scale: Scale,
    zero_point: ZeroPoint = None,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Ints:
    """The integers of `fake_quantize`: int8 where the range fits, else uint8, else int32. NaN gives the zero point."""
    return _C.quantize(x, _scale_array(scale), _zero_point_array(zero_point), quant_min, quant_max, axis, group_size)


def dequantize(
    q: Ints,
    scale: Scale,
    zero_point: ZeroPoint = None,
    *,
    axis: int | None = None,
    group_size: int | None = None,
) -> NDArray[np.float32]:
    """`(q - zero_point) * scale` in float32, for q int8, uint8 or int32."""
    return _C.dequantize(q, _scale_array(scale), _zero_point_array(zero_point), axis, group_size)


def quantize_rows(x: Floats) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """x `[..., K]` -> (q int8 `[..., K]`, scale float32 `[...]`), symmetric, `scale = max|row| / 127`."""
    return _C.quantize_rows(x)


def fake_quantize_rows(x: Floats) -> Floats:
    """`quantize_rows` and back: `q * scale`, like x."""
    return _C.fake_quantize_rows(x)


def binarize_rows(x: Floats) -> tuple[Floats, NDArray[np.float32]]:
    """x `[..., K]` -> (signs like x, -1 where x < 0, else 1; float32 `[...]`, the mean of `|x|` over each row)."""
    return _C.binarize_rows(x)


def pack_int8_weight(w: NDArray[np.int8], bits: int = 8) -> NDArray[np.uint8]:
    """w int8 `[N, K]` -> an opaque blob, uint8 `[N, ...]`, for this machine's kernels. Store w, not the blob.

    With `bits` 4 or 2, values from `-2**(bits - 1)` to `2**(bits - 1) - 1` take that many bits, for `int8_linear` and
    `int8_conv2d` alone.
    """
    return _C.pack_int8_weight(w, bits)


def unpack_int8_weight(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The inverse of `pack_int8_weight`."""
    return _C.unpack_int8_weight(packed)


def int8_matmul(a: NDArray[np.int8], b: NDArray[Any]) -> NDArray[np.int32]:
    """a int8 `[M, K]` @ b.T -> int32 `[M, N]`, exact; b int8 `[N, K]` or packed. K at most 131071."""
    return _C.int8_matmul(a, b)


def int8_linear(
    x: Floats,
    packed: NDArray[np.uint8],
    weight_scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    *,
    input_scale: float | None = None,
    input_zero_point: int | None = None,
    input_quant_max: int = 255,
    activation: str | None = None,
) -> Floats:
    """x `[..., K]` -> `activation(dequantized(x) @ dequantized(w).T + bias)`, `[..., N]`, in the dtype of x.

    Without `input_scale` each row is quantized dynamically (`quantize_rows`); with it, statically to
    `[0, input_quant_max]` around `input_zero_point` (None: the middle of that range). `activation`: None, "relu",
    "gelu" (erf form) or "silu".
    """
    return _C.int8_linear(
        x, packed, weight_scale, bias, input_scale, input_zero_point, input_quant_max, activation, False
    )


def int8_weight_only_linear(
    x: Floats,
    packed: NDArray[np.uint8],
    weight_scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    *,
    activation: str | None = None,
) -> Floats:
    """As `int8_linear`, but x stays in floating point; products and sums are float32."""
    return _C.int8_linear(x, packed, weight_scale, bias, None, None, 255, activation, True)


def int8_conv2d(
    x: Floats,
    packed: NDArray[np.uint8],
    weight_scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    input_scale: float | None = None,
    input_zero_point: int | None = None,
    input_quant_max: int = 255,
    activation: str | None = None,
) -> Floats:
    """As the function of torch tensors: x `[images, C, H, W]` -> `[images, N, output height, output width]`.

    Memory is channels last: x that is a transposed view of a contiguous `[images, H, W, C]` is read in place, and the
    result is such a view. packed: `pack_int8_weight` of w `[N, C, kernel height, kernel width]` as
    `w.transpose(0, 2, 3, 1).reshape(N, -1)`.
    """
    grid = input_scale, input_zero_point, input_quant_max
    y = _C.int8_conv2d(
        channels_last(x), packed, weight_scale, bias, kernel_size, stride, padding, dilation, *grid, activation
    )
    return y.transpose(0, 3, 1, 2)


def channels_last(x: Floats) -> Floats:
    """A view `[images, H, W, C]` of x `[images, C, H, W]`."""
    if x.ndim != 4:
        raise ValueError(f"x: expected 4 axes (images, channels, height, width), got shape {list(x.shape)}")
    return x.transpose(0, 2, 3, 1)


def pack_signs(x: Floats) -> NDArray[np.int64]:
    """x `[..., K]` -> sign bits, int64 `[..., ceil(K / 64)]`; a set bit means -1, sign(0) = +1."""
    return _C.pack_signs(x)


def unpack_signs(bits: NDArray[np.int64], k: int) -> NDArray[np.float32]:
    """Sign bits `[..., ceil(k / 64)]` -> +-1, float32 `[..., k]`."""
    return _C.unpack_signs(bits, k)


def binary_matmul(a_bits: NDArray[np.int64], b_bits: NDArray[np.int64], k: int) -> NDArray[np.int32]:
    """Dot products of +-1 vectors: a_bits `[M, W]`, b_bits `[N, W]` -> int32 `[M, N]`, exact."""
    return _C.binary_matmul(a_bits, b_bits, k)


def binary_linear(
    x: Floats | NDArray[np.int64],
    weight_bits: NDArray[np.int64],
    weight_scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    *,
    k: int | None = None,
) -> Floats:
    """x `[..., K]` -> `sign(x) @ sign(w).T * weight_scale + bias`, `[..., N]`, in the dtype of x.

    With `k`, x may be packed signs, int64 `[..., ceil(k / 64)]`; the result is then float32.
    """
    return _C.binary_linear(x, weight_bits, weight_scale, bias, k)


def binary_conv2d(
    x: Floats,
    weight_bits: NDArray[np.int64],
    weight_scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Floats:
    """As the function of torch tensors, memory as of `int8_conv2d`; padding counts as 0.

    weight_bits: `pack_signs(w.transpose(0, 2, 3, 1))` of w `[N, C, kernel height, kernel width]`.
    """
    y = _C.binary_conv2d(channels_last(x), weight_bits, weight_scale, bias, stride, padding, dilation)
    return y.transpose(0, 3, 1, 2)


def binary_threshold(
    x: Floats | NDArray[np.int64],
    weight_bits: NDArray[np.int64],
    threshold: NDArray[np.int32],
    *,
    k: int | None = None,
) -> NDArray[np.int64]:
    """Sign bits int64 `[..., ceil(N / 64)]`: bit n is set (-1) where `sign(x) @ sign(w[n]) < threshold[n]`.

    x as for `binary_linear`; threshold int32 `[N]`.
    """
    return _C.binary_threshold(x, weight_bits, threshold, k)


def pack_bitplanes(q: NDArray[Any], bits: int, form: str = "signed") -> NDArray[np.int64]:
    """q int8, or uint8 for "unsigned", `[..., K]` -> bit planes, int64 `[bits, ..., ceil(K / 64)]`.

    `form` says what the integers are: "unsigned", "signed" (two's complement) or "odd" (up to 7 bits).
    """
    return _C.pack_bitplanes(q, bits, form)


def unpack_bitplanes(planes: NDArray[np.int64], k: int, form: str = "signed") -> Ints:
    """The inverse of `pack_bitplanes`: int8, or uint8 for "unsigned", `[..., k]`."""
    return _C.unpack_bitplanes(planes, k, form)


def bitplane_matmul(
    a_planes: NDArray[np.int64],
    b_planes: NDArray[np.int64],
    k: int,
    *,
    a_form: str = "unsigned",
    b_form: str = "signed",
) -> NDArray[np.int32]:
    """Products of integers in planes: a_planes `[P, M, W]`, b_planes `[Q, N, W]` -> int32 `[M, N]`, exact."""
    return _C.bitplane_matmul(a_planes, b_planes, k, a_form, b_form)


def bitplane_linear(
    x: Floats,
    weight_planes: NDArray[np.int64],
    weight_sum: NDArray[np.int32],
    weight_scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    *,
    input_scale: float,
    input_zero_point: int | None = None,
    input_quant_max: int,
    weight_form: str = "signed",
    activation: str | None = None,
) -> Floats:
    """x `[..., K]` -> what `int8_linear` gives of the same integers on the same static grid, by xor and popcount.

    weight_planes: `pack_bitplanes(w, bits, weight_form)` of w int8 `[N, K]`; weight_sum int32 `[N]`: `w.sum(1)`.
    """
    return _C.bitplane_linear(
        x,
        weight_planes,
        weight_sum,
        weight_scale,
        bias,
        input_scale,
        input_zero_point,
        input_quant_max,
        weight_form,
        activation,
    )


def pack_indices(indices: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """indices uint8 `[N, K]`, below `2**bits` -> int32 `[ceil(N / 16), ceil(K / (32 // bits)), 16]`, on any machine."""
    return _C.pack_indices(indices, bits)


def unpack_indices(packed: NDArray[np.int32], bits: int, n: int, k: int) -> NDArray[np.uint8]:
    """The inverse of `pack_indices`: uint8 `[n, k]`."""
    return _C.unpack_indices(packed, bits, n, k)


def codebook_linear(
    x: Floats,
    packed: NDArray[np.int32],
    codebook: NDArray[np.float32],
    out_features: int,
    bias: NDArray[np.float32] | None = None,
    *,
    activation: str | None = None,
) -> Floats:
    """x `[..., K]` -> `activation(x @ codebook[indices].T + bias)`, `[..., out_features]`, in the dtype of x.

    packed: `pack_indices(indices, bits)`; codebook float32 `[2**bits]`, bits from 1 to 5.
    """
    return _C.codebook_linear(x, packed, codebook, out_features, bias, activation)


def scaled_dot_product_attention(
    query: Floats,
    key: Floats,
    value: Floats,
    attn_mask: NDArray[np.float32] | NDArray[np.bool_] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Floats:
    """`softmax(scale * query @ key.T + mask) @ value`, in float32 inside.

    query `[batch, heads, queries, size]`; key and value `[batch, kv heads, keys, size]` and `[..., value size]`, where
    kv heads divides heads; attn_mask `[batch, heads, queries, keys]`, of the first three axes any may be 1, float32
    (added) or bool (True: takes part). Returns `[batch, heads, queries, value size]`.
    """
    mask: NDArray[Any] | None = attn_mask
    if mask is not None and query.ndim == key.ndim == mask.ndim == 4:
        shape = (*query.shape[:3], key.shape[2])
        if mask.shape[3] == shape[3] and all(size in (1, n) for size, n in zip(mask.shape, shape, strict=True)):
            mask = np.broadcast_to(mask, shape)
    if scale is None:
        scale = max(query.shape[-1], 1) ** -0.5
    return _C.scaled_dot_product_attention(query, key, value, mask, is_causal, scale)


def distillation_loss(
    student_logits: Floats,
    teacher_logits: Floats,
    target: NDArray[np.int64] | None = None,
    *,
    temperature: float,
    alpha: float,
) -> float:
    """`alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) cross_entropy(student, target)`.

    Logits `[..., C]` of one dtype, target int64 `[...]`; the mean over the rows whose target is not -100.
    """
    return _C.distillation_loss(student_logits, teacher_logits, target, temperature, alpha, False)[0]


def distillation_loss_gradient(
    student_logits: Floats,
    teacher_logits: Floats,
    target: NDArray[np.int64] | None = None,
    *,
    temperature: float,
    alpha: float,
) -> tuple[float, Floats]:
    """(loss, its gradient like student_logits)."""
    loss, gradient = _C.distillation_loss(student_logits, teacher_logits, target, temperature, alpha, True)
    assert gradient is not None  # asked for
    return loss, gradient
