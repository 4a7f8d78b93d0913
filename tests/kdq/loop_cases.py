"""What the tests of other libraries' training loops share: small distillers and comparisons with `Distiller.fit`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdq
from small_models import TWO, mlp, randn

X = randn(24, 6)
Y = X[:, :4].argmax(1)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=8)
CLIP = 0.05  # below the norms of all gradients here


def distiller_of(config: Any = TWO, losses: Any = None) -> kdq.Distiller:
    """A student with dropout, a batch norm and learned scales, which start from the first batch that a model sees."""
    torch.manual_seed(1)
    student = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    if config is not None:
        kdq.prepare_qat_(student, config)
    distiller = kdq.Distiller(mlp(32), student, losses or [kdq.SoftTargets(alpha=0.5), kdq.Hint({"0": "0"})])
    distiller.prepare((X, Y))
    return distiller


def same(one: nn.Module, other: nn.Module, rtol: float = 0.0, atol: float = 0.0) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def parameter_count(modules: list[nn.Module]) -> int:
    return len([p for module in modules for p in module.parameters() if p.requires_grad])


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for entry in entries for tensor in tensors_in(entry)]


def without(teacher: nn.Module, tensors: list[Tensor]) -> bool:
    """Whether no weight of the teacher is among them."""
    return bool(tensors) and not any(
        a.shape == b.shape and torch.equal(a.float(), b.float()) for a in teacher.parameters() for b in tensors
    )


class Named(nn.Module):
    """The student of `distiller_of`, called as Trainer does."""

    def __init__(self, body: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.body, self.dropout = body, nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        y: Tensor = self.body(self.dropout(features))
        return y


def named(dropout: float = 0.0, config: Any = TWO, hint: bool = True) -> kdq.Distiller:
    plain = distiller_of(config)
    losses = [kdq.SoftTargets(alpha=0.5), kdq.Hint({"body.0": "body.0"})]
    distiller = kdq.Distiller(Named(plain.teacher), Named(plain.student, dropout), losses[: 1 + hint])
    torch.manual_seed(2)
    distiller.prepare((X, Y))
    return distiller


ROWS = [{"features": x, "labels": y} for x, y in zip(X, Y, strict=True)]


class Noisy:
    """Rows that are others each time."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        row = self.rows[i]
        if isinstance(row, dict):
            return {**row, "features": row["features"] + 0.1 * torch.randn(6)}
        return row[0] + 0.1 * torch.randn(6), row[1]


def cached_named(folder: Path) -> tuple[kdq.CachedTeacher, kdq.Distiller]:
    """A distiller of logits alone, whose teacher is cached."""
    cached = kdq.CachedTeacher(Named(mlp(16)), folder)
    return cached, kdq.Distiller(cached, Named(mlp(8, seed=1)), [kdq.SoftTargets()])


def warnings_of(call: Any) -> list[Any]:
    """Those that the call gave of a CachedTeacher."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if "CachedTeacher" in str(w.message)]


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
