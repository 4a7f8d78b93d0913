"""Small runs of `compress` that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdq

CANDIDATES = [kdq.Int8Dynamic(), kdq.LowBit(weight_bits=2, act_bits=8)]
BUDGET = kdq.Budget(average_bits=4.0)
SETTINGS = {"candidates": CANDIDATES, "epochs": 2, "finetune_epochs": 2, "progress": False}


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.BatchNorm1d(16), nn.Linear(16, 4)).eval()


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    return x, x[:, :4].argmax(1)


def loader(**options: object) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True, generator=generator, **options)


class Interrupted:
    """A loader that is killed at its n-th batch."""

    def __init__(self, batches: int) -> None:
        self.loader, self.left = loader(), batches
        self.generator = self.loader.generator

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in self.loader:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


def compressed(folder: Path, batches=None, **changed) -> kdq.Compressed:
    arguments = {"budget": BUDGET, "validation": [data()], **SETTINGS, **changed}
    return kdq.compress(model(), loader() if batches is None else batches, folder=folder, **arguments)


def same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def checkpoint(folder: Path, phase: str) -> Path:
    (file,) = folder.glob(f"{phase}-*.pt")
    return file
