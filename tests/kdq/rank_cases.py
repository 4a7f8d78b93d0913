"""What the checks of several ranks share: nets, wrappers, each rank's part of the data, and comparisons."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kdq
from kdq.distributed import learned_scales
from small_models import ONE, randn

RANKS = 2
FOUR = kdq.LowBit(weight_bits=4, act_bits=4)
CONFIGS = {"0": FOUR, "2.1": kdq.LowBit(weight_bits=2, act_bits=4, method="pact"), "3": kdq.Int8Static(), "5": ONE}
Wrap = Callable[[nn.Module], nn.Module]


def net(seed: int = 1) -> nn.Sequential:
    """12 features to 5 classes; no batch norm, whose statistics would be each rank's own."""
    torch.manual_seed(seed)
    block = nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 16), nn.ReLU())
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), block, nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))


def prepared(config: Any = None) -> nn.Sequential:
    model = net()
    kdq.prepare_qat_(model, CONFIGS if config is None else config)
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def ddp_unused(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp(model: Any, **options: Any) -> nn.Module:
    scales = learned_scales(model)
    fully_shard(model[2], ignored_params=scales, **options)
    fully_shard(model, ignored_params=scales, **options)
    return model


WRAPS: dict[str, Wrap] = {"ddp": ddp, "fsdp": fsdp}


def batches(count: int, seed: int = 0, rows: int = 12) -> list[tuple[Tensor, Tensor]]:
    """The batches of all ranks, with -100 where only the second half, rank 1's, has them."""
    made = []
    for i in range(count):
        target = torch.arange(rows) % 5
        target[rows // 2 : rows // 2 + 1 + 2 * (i % 2)] = -100
        made.append((randn(rows, 12, seed=seed + i) * (1 + torch.arange(rows)[:, None] / 4), target))
    return made


def own(loader: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x.chunk(RANKS)[dist.get_rank()], y.chunk(RANKS)[dist.get_rank()]) for x, y in loader]


def assert_same_training(ours: kdq.Distiller, single: kdq.Distiller) -> None:
    state: list[Any] = [ours.state_dict()]
    dist.broadcast_object_list(state, 0)
    assert not any("module" in name for name in state[0]["student"])
    assert_close_flat(state[0], single.state_dict())


def assert_close_flat(state: dict[str, Any], expected: dict[str, Any]) -> None:
    ours, theirs = ({f"{part}.{n}": t for part, ts in s.items() for n, t in ts.items()} for s in (state, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def assert_agreed(value: Any) -> None:
    every: list[Any] = [None] * RANKS
    dist.all_gather_object(every, value)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairwise(every))


def raises(kind: type[Exception] | tuple[type[Exception], ...], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        call()
