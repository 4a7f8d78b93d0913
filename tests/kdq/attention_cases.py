"""Attention that several tests share: sizes, layers of torch's with it, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from small_models import randn

E, HEADS, N, L, S = 12, 3, 2, 5, 7
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PAIR = (randn(3, L, 16), randn(3, S, 16, seed=1))  # source and target


def layer(**arguments: Any) -> nn.MultiheadAttention:
    """With a bias that is not zero."""
    torch.manual_seed(0)
    made = nn.MultiheadAttention(E, HEADS, **arguments)
    with torch.no_grad():
        for bias in (made.in_proj_bias, made.out_proj.bias):
            if bias is not None:
                bias.normal_()
    return made


def sequence(length: int, width: int = E, *, batch_first: bool = True, batched: bool = True, seed: int = 0) -> Tensor:
    x = randn(N, length, width, seed=seed)
    return x[0] if not batched else x if batch_first else x.transpose(0, 1).contiguous()


def encoder(**arguments: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    one = nn.TransformerEncoderLayer(16, 2, 32, **{"batch_first": True, **arguments})
    return nn.TransformerEncoder(one, 2, enable_nested_tensor=not one.norm_first and one.self_attn.batch_first)


def transformer() -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
