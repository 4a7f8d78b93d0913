"""Attention: shape inference, and the operator on CUDA tensors, which torch's own kernels are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdq_kernels._torch_library.fakes import fake


@fake("scaled_dot_product_attention")
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)


def attention_by_torch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """On GPUs by torch's own kernels, which are made for these units. They take a mask or the causal one, not both."""
    added = attn_mask is not None and attn_mask.is_floating_point()
    mask = attn_mask.to(query.dtype) if attn_mask is not None and added else attn_mask
    if mask is not None and is_causal:
        later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        mask = mask.masked_fill(later, -torch.inf) if added else mask & ~later
    grouped = query.shape[1] != key.shape[1]
    y = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal and mask is None, scale=scale, enable_gqa=grouped
    )
    return y.transpose(1, 2).contiguous().transpose(1, 2)


torch.library.impl("kdq::scaled_dot_product_attention", "CUDA", attention_by_torch)
