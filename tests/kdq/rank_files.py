"""Checks that two ranks run, of what is kept in files: checkpoints, converted students, and teachers' logits."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import kdq
from kdq.distributed import alone
from rank_cases import (
    CONFIGS,
    RANKS,
    Wrap,
    assert_agreed,
    assert_close_flat,
    assert_same_training,
    batches,
    ddp,
    fsdp,
    net,
    own,
    prepared,
    raises,
)
from small_models import PRECISIONS, randn

# ---- checkpoints and conversion --------------------------------------------------------------------------------------


def checkpoints(wrap: Wrap, folder: Path) -> None:
    """Two ranks go on from one process and one process from two ranks, as if there had been one world throughout."""
    data = batches(6)

    def distiller(student: nn.Module) -> kdq.Distiller:
        torch.manual_seed(0)
        made = kdq.Distiller(net(seed=0), student, [kdq.SoftTargets(), kdq.Hint({"0": "3"})])
        made.prepare(data[0])
        return made

    def train(trained: kdq.Distiller, loader: Any) -> None:
        groups = kdq.distributed.parameter_groups(trained.parameters())
        trained.fit(loader, 1, torch.optim.SGD(groups, lr=0.01), progress=False)

    through = distiller(prepared())
    for part in (data[:2], data[2:4], data[4:]):
        train(through, part)

    first = distiller(prepared())
    train(first, data[:2])
    middle = distiller(wrap(prepared()))
    middle.load_state_dict(first.state_dict())
    train(middle, own(data[2:4]))
    state = middle.state_dict()
    path = folder / f"{wrap.__name__}.pt"
    if dist.get_rank() == 0:
        torch.save(state, path)
    dist.barrier()
    last = distiller(prepared())
    last.load_state_dict(torch.load(path, weights_only=True))
    train(last, data[4:])
    torch.testing.assert_close(last.state_dict(), through.state_dict(), rtol=1e-4, atol=1e-5)


def resumption(wrap: Wrap, folder: Path, switchable: bool = False) -> None:
    """A fit that breaks off on two ranks is taken up by one process, and the other way round, with Adam's state, the
    average of the weights and the best ones; as if there had been one process throughout."""
    data, held_out = batches(3), batches(1, seed=50)

    def fit(around: Wrap | None, path: Path, until: int) -> kdq.Distiller:
        torch.manual_seed(0)
        student = net()
        if switchable:
            kdq.prepare_switchable_(student, PRECISIONS)
        else:
            kdq.prepare_qat_(student, CONFIGS)
        kind = kdq.SwitchableDistiller if switchable else kdq.Distiller
        distiller = kind(net(seed=0), student if around is None else around(student), losses)
        part = (lambda loader: loader) if around is None else own

        def log(step: int, values: dict[str, float]) -> None:
            if step == until and "loss" in values:
                raise InterruptedError

        options: dict[str, Any] = {"ema": 0.9, "patience": 9, "checkpoint_every": 1, "log": log, "progress": False}
        with contextlib.suppress(InterruptedError):
            distiller.fit(part(data), 3, validation=part(held_out), checkpoint=path, lr=1e-3, **options)
        return distiller

    losses = [kdq.SoftTargets(), kdq.Hint({"0": "3"}), kdq.ContrastiveKD({"3": "3"}, width=8, queue=20)]
    folder = folder / ("switchable" if switchable else "plain")
    mine = folder / str(dist.get_rank())
    through = fit(None, mine / "through", until=99)

    fit(wrap, folder / wrap.__name__ / "ranks", until=5)
    dist.barrier()
    shutil.copy(folder / wrap.__name__ / "ranks", mine / f"{wrap.__name__}-to-one")
    last = fit(None, mine / f"{wrap.__name__}-to-one", until=99)
    assert_close_flat(last.state_dict(), through.state_dict())

    fit(None, mine / f"{wrap.__name__}-from-one", until=5)
    if dist.get_rank() == 0:
        shutil.copy(mine / f"{wrap.__name__}-from-one", folder / wrap.__name__ / "one")
    dist.barrier()
    assert_same_training(fit(wrap, folder / wrap.__name__ / "one", until=99), through)
    path = mine / "somewhere"
    if dist.get_rank() == 0:
        path.touch()
    raises(ValueError, "some ranks see", lambda: fit(wrap, path, until=99))


def conversion(wrap: Wrap, folder: Path) -> None:
    student = wrap(prepared())
    distiller = kdq.Distiller(net(seed=0), student, [kdq.SoftTargets()])
    distiller.fit(own(batches(2)), 1, progress=False)
    for call in (lambda: kdq.convert_(student), lambda: kdq.save(student, folder / "no")):
        raises(ValueError, "model.module" if wrap is ddp else "sharded by fully_shard", call)
    phase = kdq.Phase("lower", 1, config=kdq.LowBit(weight_bits=2, act_bits=2))
    raises(ValueError, "model: it is", lambda: distiller.run(own(batches(2)), [phase]))
    x = randn(4, 12)
    student.eval()
    y = student(x)
    state = distiller.state_dict()["student"]
    if dist.get_rank() == 0:
        plain = prepared().eval()
        plain.load_state_dict(state)
        kdq.convert_(plain)
        torch.testing.assert_close(plain(x), y.detach())


# ---- teachers --------------------------------------------------------------------------------------------------------


def sharded_teacher(wrap: Wrap, folder: Path) -> None:
    """A teacher in shards teaches as the whole one does, also through a cache that only one rank finds empty."""
    data, folder = batches(3), folder / f"cache-{wrap.__name__}"
    teachers = [net(seed=0), fsdp(net(seed=0)), kdq.CachedTeacher(fsdp(net(seed=0)), folder, dtype=torch.float32)]
    students = [kdq.Distiller(teacher, wrap(prepared()), [kdq.SoftTargets()]) for teacher in teachers]
    cached = students[-1].teacher
    if dist.get_rank() == 0:
        with alone():
            kdq.CachedTeacher(net(seed=0), folder, dtype=torch.float32)(own(data)[1][0])
    dist.barrier()
    for distiller in students:
        distiller.fit(own(data), 2, lr=1e-3, progress=False)
    for distiller in students[1:]:
        torch.testing.assert_close(distiller.state_dict(), students[0].state_dict(), rtol=1e-4, atol=1e-5)
    assert (cached.hits, cached.misses) == ((24, 12) if dist.get_rank() == 0 else (18, 18))


def shared_cache(folder: Path) -> None:
    """Both write at once, partly the same samples; afterwards each reads what the other wrote."""
    cached = kdq.CachedTeacher(net(seed=0), folder / "b", top_k=3)
    common = randn(64, 12, seed=7)
    for i in range(8):
        cached(torch.cat([common[8 * i : 8 * i + 8], randn(8, 12, seed=100 * dist.get_rank() + i)]))
    dist.barrier()
    misses = cached.misses
    for other in range(RANKS):
        for i in range(8):
            cached(randn(8, 12, seed=100 * other + i))
    assert cached.misses == misses
    with alone():
        assert_agreed(cached(common))
