"""Convolutions that several tests share: configs, layers and a small network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdq
from kdq.configs import Config
from small_models import randn

FOUR = kdq.LowBit(weight_bits=4, act_bits=4)
CONFIGS: list[Config] = [kdq.Int8Dynamic(), kdq.Int8Static(), FOUR, kdq.LowBit(weight_bits=1, act_bits=4), kdq.Binary()]
METHODS: list[Config] = [kdq.LowBit(weight_bits=3, act_bits=4, method=method) for method in ("pact", "dorefa")]
X = randn(3, 5, 9, 8) * 2


def in_format(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def conv(seed: int = 0, **others: Any) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(5, 7, **{"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (1, 2), **others})


def prepared(config: Config, layer: nn.Conv2d | None = None, x: Tensor = X) -> Any:
    """A training twin whose grids have seen a batch."""
    model = nn.Sequential(conv() if layer is None else layer)
    kdq.prepare_qat_(model, config)
    model(x)
    return model[0]


def quantized(config: Config, layer: nn.Conv2d | None = None, x: Tensor = X) -> Any:
    model = nn.Sequential(conv() if layer is None else layer)
    kdq.quantize_(model, config, calibration=[x])
    return model[0]


def net(seed: int = 0) -> nn.Sequential:
    """5 channels to 4 classes, with a norm to fold and an activation to fuse."""
    torch.manual_seed(seed)
    first = [nn.Conv2d(5, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Tanh()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
