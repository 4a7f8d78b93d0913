"""Random numbers that a resumed run draws as the uninterrupted one did: each epoch has a seed of its own."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kdq.checkpoint import generators_of


@contextmanager
def seeded(seed: int, loader: Iterable[Any], owner: object = None) -> Iterator[None]:
    """torch, NumPy and random start from the seed inside, and so do the generators of a DataLoader and its samplers,
    which decide about the order, and the owner's; the global ones go on afterwards as if nothing had been."""
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state())  # noqa: NPY002 users' transforms use it
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    for generator in generators_of(loader, owner):
        generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002
