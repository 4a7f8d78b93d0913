"""use_attention_kernel_: the attention of Hugging Face models on kdq's kernel.

model = AutoModelForCausalLM.from_pretrained(...)
kdq.quantize_(model, kdq.Int8Dynamic())
use_attention_kernel_(model)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.layers.attention import has_kernel

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        "kdq.integrations.transformers_attention needs transformers 5: "
        f"pip install 'kdq-kernels[transformers]' ({error})"
    ) from error

NAME = "kdq"  # in transformers' registry of attention functions


def use_attention_kernel_(model: PreTrainedModel) -> None:
    """Makes a Hugging Face model compute attention by `kdq_kernels.scaled_dot_product_attention` from now on, in place.

    It is for models that transformers runs by torch's `scaled_dot_product_attention` ("sdpa"), which goes on doing what
    the kernel does not: training, dropout, position biases, several dtypes in one call, and tensors on other devices
    than the CPU. As with "sdpa", attention weights are not returned (`output_attentions`).

    Raises:
        TypeError: the model is not one of transformers.
        ValueError: its attention is more than "sdpa" computes (attention sinks, capped logits), or its code does not
            ask transformers for its attention function.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if not model._supports_sdpa or capped:
        what = "caps the logits of its attention" if capped else "has attention that 'sdpa' does not compute"
        raise ValueError(f"model: {type(model).__name__} {what}")
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(f"model: {type(model).__name__} has attention of its own, which transformers cannot exchange")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: from `[batch, heads, positions, size]` to `[batch, positions, heads, size]`."""
    if others.get("s_aux") is not None:
        raise ValueError(f"s_aux: expected none, as attention sinks are not computed here, got {others['s_aux'].shape}")
    asks_more = any(others.get(name) is not None for name in ("position_bias", "softcap")) or dropout > 0
    broadcasts = query.shape[0] != key.shape[0]
    if asks_more or broadcasts or others.get("output_attentions") or not has_kernel(query, key, value, attention_mask):
        y, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
        return y, None
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask = attention_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    alone = mask is None and query.shape[2] > 1  # a mask holds the causal one already, a new token sees all before it
    y = kk.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal and alone, scale=scaling)
    return y.transpose(1, 2), None
