"""Inputs and a model that the tests of post-training tools share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randn(*shape: int, seed: int = 1) -> Tensor:
    """Of another seed than the weights of models."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(24, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.ReLU()), nn.Linear(64, 16)
    ).eval()
