"""Multi-head attention whose projections are plain linear layers, so that all that takes these takes attention too.

`kdq.open_attention_` puts it in the place of nn.MultiheadAttention, which holds its projections as parameters of its
own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import kdq_kernels as kk

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class MultiheadAttention(nn.Module):
    """nn.MultiheadAttention on nn.Linear children (Vaswani et al.: Attention Is All You Need, 2017): `q_proj` (E -> E),
    `k_proj` (kdim -> E), `v_proj` (vdim -> E) and `out_proj` (E -> E).

    They are three projections also where query, key and value are one tensor. One product for all three is faster there
    (an int8 layer of 384 features takes 125 us instead of 140 at 128 rows, and a quantized encoder of such layers 1.5
    to 2.5 % less time, 5 % less at 16 rows; Zen 5, one thread), but a module cannot know that it will always be
    given one tensor, a quantized layer cannot be cut where it is not, and three may have a precision each.

    Args:
        layer: whose parameters it takes: the objects themselves, but those of a packed `in_proj`, of which it has
            copies.

    Attributes are named as in nn.MultiheadAttention: embed_dim (E), num_heads, head_dim, kdim, vdim, dropout,
    batch_first. A state dict of an nn.MultiheadAttention loads too.

    Raises:
        ValueError: the layer cannot be taken (`why_not_attention`).
    """

    # By these torch's transformer layers decide about their fused path, which would read parameters that are not here.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        reason = why_not_attention(layer)
        if reason is not None:
            raise ValueError(f"layer: {reason}")
        self.embed_dim, self.kdim, self.vdim = layer.embed_dim, layer.kdim, layer.vdim
        self.num_heads, self.head_dim = layer.num_heads, layer.head_dim
        self.dropout = layer.dropout
        self.batch_first = layer.batch_first
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        if layer.in_proj_weight is not None:
            weights = _three(layer.in_proj_weight)
        biases = (None, None, None) if layer.in_proj_bias is None else _three(layer.in_proj_bias)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(layer.out_proj.weight, layer.out_proj.bias)
        self.train(layer.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention, but for nested tensors.

        Args:
            query: `[N, L, E]` if batch_first, `[L, N, E]` if not, or `[L, E]`.
            key, value: likewise, with S positions of kdim and vdim features.
            key_padding_mask: `[N, S]` (`[S]` without a batch): bool, true where a key does not count, or float, which
                is added to the logits.
            need_weights: whether to return them. Without is faster.
            attn_mask: `[L, S]` or `[N * num_heads, L, S]`, bool or float likewise.
            average_attn_weights: over the heads.
            is_causal: a promise that attn_mask, which must be given, is the causal mask.

        Returns:
            The result, as query; and after dropout the weights, `[N, L, S]` or `[N, num_heads, L, S]` (without N if
            there is no batch), or None.

        Raises:
            ValueError: a tensor or mask has another shape, a mask another dtype, one is nested, or is_causal comes
                without attn_mask.
        """
        self._check(query, key, value)
        q, k, v = map(self._heads, (self.q_proj(query), self.k_proj(key), self.v_proj(value)))
        if is_causal and attn_mask is None:
            raise ValueError("is_causal: expected attn_mask too, which it says is causal, got None")
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None
        if not hinted and attn_mask is not None:
            mask = _attention_mask(attn_mask, q, k)
        if key_padding_mask is not None:
            padding = _padding_mask(key_padding_mask, k, batched=key.dim() == 3)
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attention(q, k, v, mask, dropout=dropout, is_causal=hinted, need_weights=need_weights)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if query.dim() == 3 else weights.squeeze(0)
        y: Tensor = self.out_proj(self._joined(mixed, like=query))
        return y, weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        named = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        if query.dim() not in (2, 3):
            raise ValueError(f"query: expected 3 axes, or 2 without a batch, got {query.dim()}")
        for name, (x, features) in named.items():
            if x.is_nested:
                raise ValueError(f"{name}: expected a padded tensor and key_padding_mask, got a nested tensor")
            if x.dim() != query.dim() or x.shape[-1] != features:
                raise ValueError(
                    f"{name}: expected {query.dim()} axes, {features} features in the last, got {list(x.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"value: expected the positions of key, {list(key.shape)}, got {list(value.shape)}")
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
            raise ValueError(f"key: expected a batch of {query.shape[batch]}, as query has, got {key.shape[batch]}")

    def _heads(self, x: Tensor) -> Tensor:
        """`[N, num_heads, positions, head_dim]` of projected queries, keys or values."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _joined(self, mixed: Tensor, like: Tensor) -> Tensor:
        """The inverse of `_heads`."""
        if like.dim() == 2:
            return mixed.squeeze(0).transpose(0, 1).flatten(-2)
        return (mixed.transpose(1, 2) if self.batch_first else mixed.permute(2, 0, 1, 3)).flatten(-2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Of an nn.MultiheadAttention, gives its parameters the names that they have here."""
        for kind in ("weight", "bias"):
            packed = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            if packed is not None:
                parts = zip(PROJECTIONS, packed.tensor_split(3), strict=True)
                state_dict |= {f"{prefix}{name}.{kind}": part for name, part in parts}
        for name in PROJECTIONS:
            own = state_dict.pop(f"{prefix}{name}_weight", None)
            if own is not None:
                state_dict[f"{prefix}{name}.weight"] = own
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads} heads, dropout={self.dropout}, batch_first={self.batch_first}"


# ---- the attention itself --------------------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    is_causal: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """`softmax(query key^T / sqrt(D) + mask) value`, and the weights if they are needed.

    Without these, and where nothing is trained, by the kernel on CPU tensors; else by torch.

    Args:
        query: `[N, H, L, D]`; key and value `[N, H, S, D]`.
        mask: float, of a shape that broadcasts to `[N, H, L, S]`.
        is_causal: in the place of a mask, where no weights are needed.

    Returns:
        `[N, H, L, D]`; `[N, H, L, S]` or None.
    """
    if not need_weights and dropout == 0 and has_kernel(query, key, value, mask):
        added = None if mask is None else mask.float()
        return kk.scaled_dot_product_attention(query, key, value, added, is_causal=is_causal), None
    if not need_weights:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal), None
    logits = (query * math.sqrt(1 / query.shape[-1])) @ key.transpose(-2, -1)
    weights = (logits if mask is None else logits + mask).softmax(-1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return weights @ value, weights


def has_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel computes attention of these: on the CPU, in one dtype, and nobody asks for a gradient or
    for forward-mode derivatives."""
    operands = [query, key, value] if mask is None else [query, key, value, mask]
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    if trained or forward_ad._current_level >= 0:
        return False
    one_dtype = query.dtype == key.dtype == value.dtype and query.dtype in KERNEL_DTYPES
    return one_dtype and all(x.is_cpu for x in operands)


def _attention_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """As it is added to logits, `[1 or N, 1 or H, L, S]`."""
    batch, heads, length, _ = query.shape
    plane = (length, key.shape[2])
    if mask.shape not in (plane, (batch * heads, *plane)):
        raise ValueError(f"attn_mask: expected {list(plane)} or {[batch * heads, *plane]}, got {list(mask.shape)}")
    mask = _added("attn_mask", mask, query)
    return mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, heads))


def _padding_mask(mask: Tensor, key: Tensor, batched: bool) -> Tensor:
    """As it is added to logits, `[N, 1, 1, S]`."""
    expected = (key.shape[0], key.shape[2]) if batched else (key.shape[2],)
    if mask.shape != expected:
        raise ValueError(f"key_padding_mask: expected {list(expected)}, got {list(mask.shape)}")
    return _added("key_padding_mask", mask, key).reshape(key.shape[0], 1, 1, key.shape[2])


def _added(name: str, mask: Tensor, like: Tensor) -> Tensor:
    """A bool mask as the float one that means the same."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise ValueError(f"{name}: expected bool or a float dtype, got {mask.dtype}")
    return mask


# ---- from nn.MultiheadAttention --------------------------------------------------------------------------------------


def why_not_attention(layer: Any) -> str | None:
    """The reason why an nn.MultiheadAttention cannot be taken; None if it can."""
    if type(layer) is not nn.MultiheadAttention:
        return f"{type(layer).__name__} is not nn.MultiheadAttention itself: its own code might read the parameters"
    if type(layer.out_proj) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"its out_proj is a {type(layer.out_proj).__name__}; expected the one that torch puts there"
    if layer.bias_k is not None:
        return "it has add_bias_kv, a key and a value that no projection computes"
    return "it has add_zero_attn, a key and a value that no projection computes" if layer.add_zero_attn else None


def _three(packed: nn.Parameter) -> Any:
    """Parameters of their own for queries, keys and values."""
    return [nn.Parameter(p.clone(), requires_grad=packed.requires_grad) for p in packed.detach().chunk(3)]


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """With these parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer
