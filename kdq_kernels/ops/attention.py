"""Attention, for inference."""

from __future__ import annotations

from torch import Tensor

from kdq_kernels._torch_library.calls import operators


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
    return operators().scaled_dot_product_attention(query, key, value, attn_mask, is_causal, scale)
