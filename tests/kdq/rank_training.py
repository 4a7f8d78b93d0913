"""Checks that two ranks run, most against one process on all data: training, its grids, and what breaks it off."""

from __future__ import annotations

import contextvars
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import kdq
from kdq.distributed import alone, together
from rank_cases import (
    FOUR,
    RANKS,
    Wrap,
    assert_agreed,
    assert_same_training,
    batches,
    ddp,
    ddp_unused,
    fsdp,
    net,
    own,
    prepared,
    raises,
)
from small_models import PRECISIONS, randn

# ---- training --------------------------------------------------------------------------------------------------------


def training(wrap: Wrap) -> None:
    """Weights, scales, adapters, losses, validation; with rows that one rank leaves out, and losses across rows."""
    losses = [
        kdq.SoftTargets(T=2.0, alpha=0.5),
        kdq.Hint({"2": "2"}),
        kdq.Hint({"0": "3"}, weight=0.1),
        kdq.RelationalKD({"2.1": "2"}, weight=0.1),
        kdq.ContrastiveKD({"3": "3"}, width=8, queue=20),
    ]
    data, held_out = batches(4), batches(2, seed=50)

    def train(student: nn.Module, loader: Any, validation: Any, seed: int) -> tuple[kdq.Distiller, kdq.History]:
        distiller = kdq.Distiller(net(seed=0), student, losses)
        torch.manual_seed(seed)  # of the adapters: rank 0's count
        distiller.prepare(loader[0])
        optimizer = torch.optim.SGD(kdq.distributed.parameter_groups(distiller.parameters()), lr=0.01, momentum=0.9)
        options: Any = {"accumulate": 2, "clip_grad_norm": 5.0, "validation": validation, "progress": False}
        return distiller, distiller.fit(loader, 2, optimizer, **options)

    ours, history = train(wrap(prepared()), own(data), own(held_out), seed=dist.get_rank())
    single, expected = train(prepared(), data, held_out, seed=0)
    assert_same_training(ours, single)
    torch.testing.assert_close(torch.tensor(history.losses), torch.tensor(expected.losses))
    for found, right in zip(history.validation, expected.validation, strict=True):
        torch.testing.assert_close(torch.tensor(list(vars(found).values())), torch.tensor(list(vars(right).values())))
    assert_agreed((history.losses, history.validation))


def default_optimizer(wrap: Wrap) -> None:
    """Adam, which `fit` makes itself, also clips plain and sharded parameters together."""
    data = batches(2)
    pair = []
    for student, loader in ((wrap(prepared()), own(data)), (prepared(), data)):
        distiller = kdq.Distiller(net(seed=0), student, [kdq.SoftTargets()])
        distiller.fit(loader, 2, lr=1e-3, progress=False)
        pair.append(distiller)
    assert_same_training(*pair)


def own_loop(wrap: Wrap) -> None:
    """`loss` and torch's own steps; the gradients of scales and adapters are averaged by the backward pass."""
    data = batches(3)
    pair = []
    for student, loader in ((wrap(prepared()), own(data)), (prepared(), data)):
        distiller = kdq.Distiller(net(seed=0), student, [kdq.SoftTargets(), kdq.Hint({"0": "3"})])
        torch.manual_seed(dist.get_rank())
        torch.manual_seed(3)
        distiller.prepare(loader[0])
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
        for batch in loader:
            distiller.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        pair.append(distiller)
    assert_same_training(*pair)


def switchable(wrap: Wrap) -> None:
    """Ranks with other seeds take the same draw; scales that a step leaves out keep no gradient."""
    data = batches(4)

    def train(wrap: Wrap, loader: Any, seed: int) -> kdq.Distiller:
        student = net()
        kdq.prepare_switchable_(student, PRECISIONS)
        losses = [kdq.SoftTargets(T=2.0, alpha=0.5), kdq.Hint({"2": "2"}), kdq.ContrastiveKD({"3": "3"}, 8, queue=20)]
        distiller = kdq.SwitchableDistiller(net(seed=0), wrap(student), losses, seed=seed)
        torch.manual_seed(0)
        distiller.prepare(loader[0])
        optimizer = torch.optim.SGD(kdq.distributed.parameter_groups(distiller.parameters()), lr=1e-3, momentum=0.9)
        distiller.fit(loader, 2, optimizer, progress=False)
        return distiller

    ours = train(ddp_unused if wrap is ddp else wrap, own(data), seed=5 + dist.get_rank())
    assert_same_training(ours, train(lambda student: student, data, seed=5))


def teacher_that_trains(wrap: Wrap) -> None:
    data = batches(3)
    teachers = []
    for around, loader in ((wrap, own(data)), (lambda model: model, data)):
        teacher, student = around(net(seed=0)), around(prepared())
        losses = [kdq.CrossEntropy(), kdq.SoftTargets()]
        distiller = kdq.Distiller(teacher, student, losses, train_teacher=True)
        groups = kdq.distributed.parameter_groups(distiller.parameters())
        distiller.fit(loader, 1, torch.optim.SGD(groups, lr=0.05), progress=False)
        teachers.append(kdq.Distiller(student, teacher, losses))
    assert_same_training(*teachers)
    expected = "around both student and teacher"
    raises(ValueError, expected, lambda: kdq.Distiller(net(), wrap(net()), [kdq.SoftTargets()], train_teacher=True))


def decisions(wrap: Wrap) -> None:
    """Ranks whose own validation would say otherwise stop at the same epoch, with the same weights put back."""
    x = randn(24, 12)
    target = net(seed=0)(x).argmax(1)
    validation = [(x[:16], target[:16]) if dist.get_rank() == 0 else (x[16:], (target[16:] + 1) % 5)]
    distiller = kdq.Distiller(net(seed=0), wrap(prepared()), [kdq.SoftTargets()])
    history = distiller.fit(own(batches(2)), 8, lr=0.03, validation=validation, patience=2, progress=False)
    assert_agreed((history.best_epoch, history.validation))
    assert history.validation[0].accuracy is not None


def batch_statistics(wrap: Wrap) -> None:
    """Running statistics are rank 0's on all ranks, as DDP has it."""
    student = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Sequential(nn.Linear(12, 5)))
    kdq.prepare_qat_(student, FOUR)
    model = wrap(student)
    kdq.Distiller(net(seed=0), model, [kdq.SoftTargets()]).fit(own(batches(3)), 1, progress=False)
    for buffer in model.buffers():
        assert_agreed(buffer)


def mixed_precision() -> None:
    """FSDP2's bfloat16 leaves learned scales in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    student = fsdp(prepared(FOUR), mp_policy=policy)
    seen = []
    layer: Any = student[0]
    hook = layer.register_forward_hook(lambda m, _, y: seen.append((m.weight.dtype, m.weight_scale.dtype, y.dtype)))
    distiller = kdq.Distiller(net(seed=0), student, [kdq.SoftTargets()])
    history = distiller.fit(own(batches(3)), 4, lr=3e-3, progress=False)
    hook.remove()
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.bfloat16)}, set(seen)
    assert history.losses[-1] < history.losses[0]
    for scale in distiller._replicated:
        assert_agreed(scale.detach())


# ---- grids -----------------------------------------------------------------------------------------------------------


def observers() -> None:
    data = batches(4)
    exact = (kdq.MinMax(), kdq.MeanSquaredError(), kdq.Percentile(99.0), kdq.KLHistogram())
    for observer in (*exact, kdq.MovingAverage()):
        ours, single = net(), net()
        with together():
            kdq.quantize_(ours, kdq.Int8Static(), calibration=own(data), observer=observer)
        kdq.quantize_(single, kdq.Int8Static(), calibration=data, observer=observer)
        for name, tensor in ours.state_dict().items():
            assert_agreed(tensor)
            if observer in exact:
                assert torch.equal(tensor, single.state_dict()[name]), (observer, name)


def first_batches() -> None:
    """Grids of training twins start from all ranks' batches, or by express wish from a rank's own."""
    x = batches(1)[0][0]
    part = x.chunk(RANKS)[dist.get_rank()]
    single, ours = prepared(), prepared()
    with alone():
        single(x)
    with together():
        ours(part)
    torch.testing.assert_close(ours.state_dict(), single.state_dict())
    for unsaid in (lambda: prepared()(part), lambda: kdq.Distiller(net(), prepared(), [kdq.SoftTargets()])):
        raises((RuntimeError, ValueError), "kdq.distributed.alone()", partial(contextvars.Context().run, unsaid))
    with alone():
        other = prepared()
        other(part)
    scales: list[Any] = [None] * RANKS
    dist.all_gather_object(scales, float(other[0].input_grid.scale.detach()))
    assert scales[0] != scales[1], "each from its own rows"
    with together():
        empty = prepared()
        empty(part if dist.get_rank() == 0 else part[:0])
    with alone():
        single = prepared()
        single(x[: len(x) // 2])
    torch.testing.assert_close(empty.state_dict(), single.state_dict())


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def uneven_loaders(wrap: Wrap) -> None:
    data = own(batches(3))
    short = data[: 3 - dist.get_rank()]
    distiller = kdq.Distiller(net(seed=0), wrap(prepared()), [kdq.SoftTargets()])
    expected = "rank 1 had no more batches after 2"
    raises(ValueError, expected, lambda: distiller.fit(short, 1, progress=False))
    raises(ValueError, expected, lambda: distiller.fit(data, 1, validation=short, progress=False))


def not_finite_on_one_rank(wrap: Wrap) -> None:
    data = own(batches(2))
    if dist.get_rank() == 1:
        data[1][0][-1, 0] = torch.nan
    distiller = kdq.Distiller(net(seed=0), wrap(net()), [kdq.SoftTargets()])
    raises(RuntimeError, "the loss is nan at step 2", lambda: distiller.fit(data, 1, progress=False))


def part_of_the_ranks() -> None:
    groups = [dist.new_group([rank]) for rank in range(RANKS)]
    model = DistributedDataParallel(net(), process_group=groups[dist.get_rank()])
    raises(ValueError, "all 2 ranks", lambda: kdq.Distiller(net(seed=0), model, [kdq.SoftTargets()]))


def a_rank_that_dies(wrap: Wrap) -> None:
    """The last check of a pair of processes: rank 1 is killed within an epoch, and rank 0 gets an error instead of
    waiting for it."""

    def loader() -> Iterator[Any]:
        for i, batch in enumerate(own(batches(5))):
            if i == 3 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    distiller = kdq.Distiller(net(seed=0), wrap(prepared()), [kdq.SoftTargets()])
    with pytest.raises(RuntimeError):  # gloo's words
        distiller.fit(loader(), 1, progress=False)


WITH_WRAP: list[Callable[[Wrap], None]] = [
    training, default_optimizer, own_loop, switchable, teacher_that_trains, decisions, batch_statistics, uneven_loaders,
    not_finite_on_one_rank, a_rank_that_dies,
]  # fmt: skip
WITHOUT: list[Callable[[], None]] = [mixed_precision, observers, first_batches, part_of_the_ranks]
