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

    What the kernel does not do goes where it went before, to torch: training, dropout, position biases, and tensors on
    other devices than the CPU.

    Raises:
        TypeError: the model is not one of transformers.
        ValueError: its code does not ask transformers for its attention function.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
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
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    biased = others.get("position_bias") is not None or others.get("softcap") is not None
    if trained or dropout > 0 or biased or not query.is_cpu:
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
