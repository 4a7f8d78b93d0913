"""Linear layers whose weights are indices of a few centroids."""

from __future__ import annotations

import torch
from torch import Tensor

from kdq_kernels._torch_library.calls import operators

_ops = torch.ops.kdq


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
    return operators().codebook_linear(x, packed, codebook, out_features, bias, activation)
