"""Latent weights of binary layers, kept where their gradient reaches them."""

from __future__ import annotations

import torch
from torch import nn

from kdq.layers.qat import BinaryTwin


@torch.no_grad()
def clip_weights_(model: nn.Module) -> None:
    """Clips the float weights of binary training twins to [-1, 1]; call it after each step of the optimizer.

    Beyond, the straight-through gradient is zero, and growing further would only make a sign harder to change
    (Courbariaux et al., "BinaryConnect", 2015).
    """
    for module in model.modules():
        if isinstance(module, BinaryTwin):
            module.weight.clamp_(-1, 1)
