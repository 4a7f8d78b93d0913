"""Products, linear layers and convolutions of signs, packed in bits."""

from __future__ import annotations

import torch
from torch import Tensor

from kdq_kernels._torch_library.calls import operators
from kdq_kernels.ops.arguments import Pair

_ops = torch.ops.kdq


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
    return operators().binary_matmul(a_bits, b_bits, k)


def binary_linear(
    x: Tensor, weight_bits: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, k: int | None = None
) -> Tensor:
    """x `[..., K]` -> `sign(x) @ sign(w).T * weight_scale + bias`, `[..., N]`, in the dtype of x.

    The signs of x are packed inside. weight_bits int64 `[N, ceil(K / 64)]`; weight_scale float32 `[N]`: XNOR-Net's
    alpha, the mean magnitude of the channel's weights (Rastegari et al. 2016). With `k`, the number of features, x may
    be packed signs, int64 `[..., ceil(k / 64)]`; the result is then float32. NaN counts as +1, as in `pack_signs`.

    Bits do not know how many they are: weights of fewer features than x, in as many words, are not refused, and those
    that are missing count as +1. For inference: no gradient.
    """
    return operators().binary_linear(x, weight_bits, weight_scale, bias, k)


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
    return operators().binary_conv2d(x, weight_bits, weight_scale, bias, stride, padding, dilation)


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
    return operators().binary_threshold(x, weight_bits, threshold, k)
