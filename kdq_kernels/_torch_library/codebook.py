"""The codebook family: shape inference."""

from __future__ import annotations

import torch
from torch import Tensor

from kdq_kernels._torch_library.fakes import fake


@fake("pack_indices")
def _(indices: Tensor, bits: int) -> Tensor:
    n, k = indices.shape
    per_word = 32 // bits
    return indices.new_empty(((n + 15) // 16, (k + per_word - 1) // per_word, 16), dtype=torch.int32)


@fake("unpack_indices")
def _(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    return packed.new_empty((n, k), dtype=torch.uint8)


@fake("codebook_linear")
def _(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))
