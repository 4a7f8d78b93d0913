"""Trainings that are killed and taken up: the same weights, bit for bit; the average of weights; the log."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdq
from kdq import checkpoint
from kdq.averaging import WeightAverage
from kdq.losses import Linear
from kdq.training import settings_of
from small_models import FOUR, INT8, ONE, TWO, mlp, randn

X = randn(48, 6)
DATA = (X, X[:, :4].argmax(1))
HELD = [(randn(20, 6, seed=5), torch.arange(20) % 4)]


class Killed(Exception):
    """Nothing in kdq catches it."""


class Batches:
    """Six shuffled batches with noise of every kind; at its n-th batch the process is killed."""

    def __init__(self, left: int | None, generator: torch.Generator | None) -> None:
        self.loader = DataLoader(TensorDataset(*DATA), batch_size=8, shuffle=True, generator=generator)
        self.generator, self.left = generator, left

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for x, y in self.loader:
            if self.left == 0:
                raise Killed
            self.left = None if self.left is None else self.left - 1
            noise = np.random.standard_normal(6) * random.random()  # noqa: NPY002
            yield x + 0.01 * torch.from_numpy(noise).float() + 0.01 * torch.randn(x.shape), y


def student_of(config: Any = TWO) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 4))
    if config is not None:
        kdq.prepare_qat_(model, config)
    return model


def plain(path: Path | None, left: int | None = None, config: Any = TWO, **options: Any) -> tuple[nn.Module, Any]:
    """Its own Adam, the loader's order from a generator."""
    student = student_of(config)
    losses = [kdq.Weighted(kdq.SoftTargets(alpha=0.5), Linear(1.0, 0.5)), kdq.Hint({"0": "0"})]
    distiller = kdq.Distiller(mlp(16), student, losses)
    loader = Batches(left, torch.Generator().manual_seed(3))
    return student, distiller.fit(loader, 3, lr=1e-2, checkpoint=path, progress=False, **options)


def rounded(path: Path | None, left: int | None = None, **options: Any) -> tuple[nn.Module, Any]:
    """A float student inside an autocast, which keeps its rounded weights."""
    with torch.autocast("cpu", torch.bfloat16):
        return plain(path, left, None, **options)


def everything(path: Path | None, left: int | None = None, **options: Any) -> tuple[nn.Module, Any]:
    """The user's optimizer and scheduler, accumulation, clipping, an average, validation and early stopping; the
    loader's order from torch's global generator; negatives in a queue."""
    student = student_of()
    contrast = kdq.ContrastiveKD({"0": "0"}, width=4, queue=16)
    distiller = kdq.Distiller(mlp(16), student, [kdq.SoftTargets(), kdq.CrossEntropy(), contrast])
    distiller.prepare(DATA)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    more = {"accumulate": 4, "clip_grad_norm": 1.0, "ema": 0.9, "validation": HELD, "patience": 3}
    more |= {"scheduler": scheduler, "checkpoint": path, "progress": False, **options}
    return student, distiller.fit(Batches(left, None), 3, optimizer, **more)


def switchable(path: Path | None, left: int | None = None, **options: Any) -> tuple[nn.Module, Any]:
    student = mlp(12, seed=1)
    kdq.prepare_switchable_(student, [INT8, FOUR, TWO, ONE])
    distiller = kdq.SwitchableDistiller(mlp(16), student, [kdq.SoftTargets()])
    return student, distiller.fit(Batches(left, None), 3, checkpoint=path, progress=False, **options)


def phases(path: Path | None, left: int | None = None, **options: Any) -> tuple[nn.Module, Any]:
    """The teacher trains in the second, and the precision falls in the last."""
    student = student_of(FOUR)
    low = kdq.Phase("low", 1, (kdq.SoftTargets(), kdq.Hint({"0": "0"})), config=TWO)
    parts = [*kdq.qkd_phases((1, 1, 1)), low]
    distiller = kdq.Distiller(mlp(16), student, [kdq.SoftTargets()])
    return student, distiller.run(Batches(left, None), parts, checkpoint=path, progress=False, **options)


def seed() -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002


def same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("fit", "left"),
    [(plain, 1), (rounded, 8), (everything, 11), (everything, 12), (switchable, 9), (phases, 9), (phases, 20)],
)
def test_a_killed_training_ends_with_the_same_weights(fit: Any, left: int, tmp_path: Path) -> None:
    seed()
    whole, history = fit(None)
    after = torch.rand(1)
    for every in (None, 1):
        path = tmp_path / f"{every}.pt"
        seed()
        with pytest.raises(Killed):
            fit(path, left, checkpoint_every=every)
        seed()
        with pytest.raises(Killed):  # again, in the same epoch
            fit(path, left % 6, checkpoint_every=every)
        seed()
        resumed, told = fit(path, checkpoint_every=every)
        same(resumed, whole)
        assert torch.equal(torch.rand(1), after), "the random numbers go on as well"
        ours, theirs = (h if isinstance(h, list) else [h] for h in (told, history))
        assert [h.losses for h in ours] == [h.losses for h in theirs]
        assert [(h.steps, h.validation, h.best_epoch) for h in ours] == [
            (h.steps, h.validation, h.best_epoch) for h in theirs
        ]


def test_a_finished_training_gives_its_result_again(tmp_path: Path) -> None:
    seed()
    whole, history = everything(tmp_path / "a.pt")
    again, told = everything(tmp_path / "a.pt", left=0)
    same(again, whole)
    assert (told.losses, told.validation) == (history.losses, history.validation)


def test_killed_while_the_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of its bytes, the second time: the first one counts."""
    seed()
    whole, _ = plain(None)
    written: list[Path] = []
    save = torch.save

    def torn(states: Any, path: Path) -> None:
        save(states, path)
        written.append(path)
        if len(written) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            raise Killed

    seed()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", torn)
        with pytest.raises(Killed):
            plain(tmp_path / "a.pt")
    resumed, _ = plain(tmp_path / "a.pt")
    same(resumed, whole)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: plain(path, accumulate=2),
            r"checkpoint: .*a\.pt is of a training with accumulate = 1, this one has 2",
        ),
        (lambda path: everything(path), "checkpoint: .* is of a training with "),
        (lambda path: plain(path, checkpoint_every=0), "checkpoint_every: expected at least 1, got 0"),
        (lambda path: plain(None, checkpoint_every=1), "checkpoint_every: it needs checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]) and plain(path), "checkpoint: .* is damaged"),
        (
            lambda path: torch.save({"a": 1}, path) or plain(path),
            "checkpoint: .* is not a checkpoint of such a training",
        ),
    ],
)
def test_files_of_something_else_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(Killed):
        plain(path, 7)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        change(path)
    assert len(path.read_bytes()) <= len(before)


def test_a_loader_that_has_shrunk_is_named(tmp_path: Path) -> None:
    batches = [(randn(4, 6, seed=s), torch.arange(4)) for s in range(3)]

    def fit(loader: Any) -> None:
        kdq.Distiller(mlp(3), mlp(3, seed=1), [kdq.SoftTargets()]).fit(
            loader, 1, checkpoint=tmp_path / "a.pt", checkpoint_every=1, progress=False
        )

    def unsized(count: int, killed: bool) -> Iterator[Any]:
        yield from batches[:count]
        if killed:
            raise Killed

    with pytest.raises(Killed):
        fit(unsized(2, killed=True))
    with pytest.raises(ValueError, match="loader: it gave 1 batches, but the checkpoint has 2"):
        fit(unsized(1, killed=False))


class Spoilt:
    """Three batches an epoch; from the second epoch on another number of them, or one of NaN."""

    def __init__(self, later: int = 3, nan: bool = False) -> None:
        self.epoch, self.later, self.nan = 0, later, nan

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        late = self.epoch > 1
        for i in range(self.later if late else 3):
            x = randn(8, 6, seed=i)
            yield x * float("nan") if late and self.nan and i == 1 else x


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (Spoilt(nan=True), RuntimeError, "the loss is nan at epoch 2, step 2: lower the learning rate"),
        (Spoilt(later=2), ValueError, "loader: expected 3 batches as in the first epoch, got 2 in epoch 2"),
        (Spoilt(later=4), ValueError, "loader: expected 3 batches as in the first epoch, got 4 in epoch 2"),
        (Spoilt(later=0), ValueError, "loader: it gave no batch in epoch 2"),
    ],
)
def test_bad_input_keeps_the_checkpoint(loader: Spoilt, error: Any, message: str, tmp_path: Path) -> None:
    """The one of the epoch before; with good batches the training goes on from it, to where it would have come."""

    def fit(batches: Any, path: Path) -> nn.Module:
        student = mlp(5, seed=1)
        distiller = kdq.Distiller(mlp(16), student, [kdq.SoftTargets()])
        distiller.fit(batches, 2, lr=1e-2, checkpoint=path, progress=False)
        return student

    with pytest.raises(error, match=message):
        fit(loader, tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert len(saved["parts"]["loop"]["losses"]) == 1
    same(fit(Spoilt(), tmp_path / "a.pt"), fit(Spoilt(), tmp_path / "b.pt"))


def test_another_learning_rate_of_ones_own_optimizer_is_refused(tmp_path: Path) -> None:
    """The checkpoint would put the old one back."""

    def made(rate: float, **last_group: float) -> Any:
        student = mlp(5, seed=1)
        groups = [{"params": student[0].parameters()}, {"params": student[2].parameters(), **last_group}]
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
        return kdq.Distiller(mlp(16), student, [kdq.SoftTargets()]), optimizer, scheduler

    def fit(distiller: kdq.Distiller, optimizer: Any, scheduler: Any, nan: bool = False) -> None:
        path = tmp_path / "a.pt"
        distiller.fit(Spoilt(nan=nan), 2, optimizer, scheduler=scheduler, checkpoint=path, progress=False)

    first = made(0.25)
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        fit(*first, nan=True)
    for other, found in (
        (made(0.125), "AdamW, lr=0.125"),
        (made(0.25, lr=0.5), "AdamW, lr=0.25, lr=0.5"),
        (made(0.25, weight_decay=0.5), "AdamW, lr=0.25, lr=0.25 weight_decay=0.5"),
    ):
        with pytest.raises(ValueError, match=f"optimizer = 'AdamW, lr=0.25', this one has '{found}'; choose another"):
            fit(*other)
    fit(*first)  # in the same process, where the scheduler has changed the rate
    anew = made(0.25)
    fit(*anew)  # done already
    same(anew[0].student, first[0].student)


def test_settings_of_an_optimizer_are_those_of_any_number_of_processes() -> None:
    """Where a part of each group is sharded, it has two groups for one."""
    student = mlp(5, seed=1)

    def made(split: bool, last: float = 0.5) -> torch.optim.Optimizer:
        groups = [
            {"params": part, "lr": lr}
            for layer, lr in ((student[0], 0.25), (student[2], last))
            for part in ([[layer.weight], [layer.bias]] if split else [[layer.weight, layer.bias]])
        ]
        return torch.optim.SGD(groups)

    assert settings_of(made(split=True)) == settings_of(made(split=False)) == "SGD, lr=0.25, lr=0.5"
    assert settings_of(made(split=True, last=0.25)) == "SGD, lr=0.25"
    assert settings_of(made(split=True, last=0.125)) != settings_of(made(split=True))


def test_a_layer_that_does_not_exist_keeps_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(Killed):
        plain(path, 7)
    before = path.read_bytes()
    for hint, message in (({"9": "0"}, "student.*'9'"), ({"0": "block"}, "teacher.*'block'")):
        with pytest.raises(ValueError, match=message):
            kdq.Distiller(mlp(16), student_of(), [kdq.Hint(hint)]).fit([DATA], 3, checkpoint=path, progress=False)
    assert path.read_bytes() == before
    assert plain(path)[1].steps == 18


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_log_is_told_each_step_and_validation() -> None:
    told: list[tuple[int, dict[str, float]]] = []
    student = mlp(5, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    distiller = kdq.Distiller(mlp(16), student, [kdq.SoftTargets()])
    losses = [float(distiller.loss(x).detach()) for x in X.split(12)]
    history = distiller.fit(
        X.split(12),
        1,
        optimizer,
        scheduler=scheduler,
        accumulate=2,
        clip_grad_norm=100.0,
        validation=HELD,
        log=lambda step, values: told.append((step, values)),
        progress=False,
    )
    assert [(step, list(values)) for step, values in told] == [
        (1, ["loss", "lr", "grad_norm"]),
        (2, ["loss", "lr", "grad_norm"]),
        (2, ["accuracy", "teacher_accuracy", "teacher_kl"]),
    ]
    assert told[0][1]["loss"] == pytest.approx(sum(losses[:2]) / 2)
    assert [values["lr"] for _, values in told[:2]] == [0.5, 0.25]
    assert told[2][1]["teacher_kl"] == history.validation[0].teacher_kl


# ---- the average of weights ------------------------------------------------------------------------------------------


def test_average_is_the_formula() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.6)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for step in range(1, 9):
        with torch.no_grad():
            for value in (*model.parameters(), model[1].running_mean):
                value.normal_()
        model[1].num_batches_tracked += 1
        average.update()
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with average.in_place():
        for name, value in model.state_dict().items():
            if name != "1.num_batches_tracked":
                torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert int(model[1].num_batches_tracked) == 8, "a counter is the latest"
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_average_takes_a_scale_as_its_first_batch_made_it() -> None:
    """What it was before is a placeholder, 1.0."""
    model = nn.Sequential(nn.Linear(3, 2))
    kdq.prepare_qat_(model, TWO)
    average = WeightAverage(model, 0.999)
    for _ in range(3):
        average.update()
    model(1e-3 * randn(5, 3))
    average.update()
    scale = model[0].input_grid.scale
    assert scale < 1e-2
    assert torch.equal(average.values["0.input_grid.scale"], scale.detach())


@pytest.mark.parametrize("config", [None, TWO], ids=str)
@pytest.mark.parametrize("ema", [None, 0.9])
def test_validating_leaves_the_training_alone(config: Any, ema: float | None) -> None:
    """Also inside an autocast, which keeps the rounded weights of whoever ran last."""
    students = []
    for validation in (None, [X]):
        student = mlp(5, seed=1)
        if config is not None:
            kdq.prepare_qat_(student, config)
        with torch.autocast("cpu", torch.bfloat16):
            kdq.Distiller(mlp(16), student, [kdq.SoftTargets()]).fit(
                [X] * 2, 3, lr=0.05, ema=ema, validation=validation, progress=False
            )
        students.append(student)
    same(*students)


def test_average_in_half_precision_does_not_stand_still() -> None:
    model = nn.Linear(3, 2).bfloat16()
    average = WeightAverage(model, 0.999)
    average.steps = 100_000
    with torch.no_grad():
        model.weight.add_(1.0)
    before = average.values["weight"].clone()
    average.update()
    assert float((average.values["weight"] - before).min()) > 5e-4


def test_fit_validates_and_ends_with_the_average() -> None:
    teacher, students = mlp(16), [mlp(5, seed=1) for _ in range(2)]
    optimizers = [torch.optim.SGD(student.parameters(), lr=0.5) for student in students]
    distiller = kdq.Distiller(teacher, students[0], [kdq.SoftTargets(T=1.0)])
    history = distiller.fit([X] * 3, 2, optimizers[0], ema=0.5, validation=[X], progress=False)
    assert float(distiller.loss(X).detach()) == pytest.approx(history.validation[-1].teacher_kl, rel=1e-5)
    average = WeightAverage(students[1], 0.5)
    for _ in range(6):
        kdq.SoftTargets(T=1.0)(students[1](X), teacher(X)).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        average.update()
    for name, value in students[0].named_parameters():
        torch.testing.assert_close(value.detach(), average.values[name])
    with pytest.raises(ValueError, match=r"ema: expected a decay from 0 to below 1, got 1\.0"):
        distiller.fit([X], 1, ema=1.0, progress=False)
