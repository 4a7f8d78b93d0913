"""What each of two processes does in `test_distributed`: ranks are compared with one process on all their data."""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import kdq
from kdq.distributed import alone, learned_scales, together
from small_models import ONE, PRECISIONS, randn

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


def checks(folder: Path) -> dict[str, Callable[[], None]]:
    made: dict[str, Callable[[], None]] = {}
    each: list[Callable[[Wrap], None]] = [
        training, default_optimizer, own_loop, switchable, teacher_that_trains, decisions, batch_statistics,
        uneven_loaders, not_finite_on_one_rank, a_rank_that_dies,
    ]  # fmt: skip
    for check in each:
        made |= {f"{check.__name__}-{name}": lambda c=check, w=wrap: c(w) for name, wrap in WRAPS.items()}
    for saved in (checkpoints, resumption, conversion, sharded_teacher):
        made |= {f"{saved.__name__}-{name}": lambda c=saved, w=wrap: c(w, folder) for name, wrap in WRAPS.items()}
    for name, wrap in {"ddp": ddp_unused, "fsdp": fsdp}.items():
        made[f"resumption_switchable-{name}"] = lambda w=wrap: resumption(w, folder, switchable=True)
    made[shared_cache.__name__] = lambda: shared_cache(folder)
    for alone_ in (mixed_precision, observers, first_batches, part_of_the_ranks):
        made[alone_.__name__] = alone_
    return made


NAMES = tuple(name for name in checks(Path()) if "dies" not in name)
DEATHS = tuple(name for name in checks(Path()) if "dies" in name)


def main(rank: int, folder: Path, names: tuple[str, ...]) -> None:
    """Runs the checks as one rank; each leaves a file `<check>.<rank>`: empty, or why it failed."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=30), RANKS, rank)
    for name in names:
        error = ""
        try:
            with alone():  # what one process does; wrapped models do otherwise by themselves
                checks(folder)[name]()
        except Exception:
            error = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(error)
        if error:
            os._exit(1)  # the other rank may wait within a collective: it gets an error too
    os._exit(0)  # its peer may be dead


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3:]))
