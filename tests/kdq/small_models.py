"""Random inputs, small models and an error that several tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kdq
from kdq.configs import Config

INT8, FOUR, TWO, ONE = (
    kdq.Int8Dynamic(),
    kdq.LowBit(weight_bits=4, act_bits=8),
    kdq.LowBit(weight_bits=2, act_bits=4),
    kdq.Binary(),
)
PRECISIONS: list[Config] = [INT8, FOUR, TWO, ONE]
MIXED: dict[str, Config] = {"1": ONE, "4.1": FOUR, "5": INT8}  # a plan for `normed_mlp`


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).norm() / expected.norm()).detach())


def mlp(width: int, seed: int = 0) -> nn.Sequential:
    """6 features to 4 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))


def normed_mlp(seed: int = 0) -> nn.Sequential:
    """12 features to 5 classes, with norms of both kinds."""
    torch.manual_seed(seed)
    block = nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 16, bias=False), nn.Tanh())
    return nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 20), nn.Tanh(), nn.BatchNorm1d(20), block, nn.Linear(16, 5))
