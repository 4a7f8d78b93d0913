"""The distiller: what it sums, what it trains and leaves alone, validation, and errors that name their cause."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq.losses import Linear, Step
from kdq.validation import validate
from small_models import mlp, randn


def test_hint_learns_through_a_regressor() -> None:
    teacher, student = mlp(16), mlp(5, seed=1)
    distiller = kdq.Distiller(teacher, student, losses=[kdq.SoftTargets(), kdq.Hint({"0": "0"}, weight=0.5)])
    x = randn(9, 6)
    distiller.prepare(x)
    total = distiller.loss(x)
    features, _ = distiller.adapters[1, "0"](student[0](x), teacher[0](x))
    expected = kdq.SoftTargets()(student(x), teacher(x)) + 0.5 * (features - teacher[0](x)).square().mean()
    torch.testing.assert_close(total, expected)
    own = {id(p) for p in distiller.own_parameters()}
    assert own
    assert not own & {id(p) for p in student.parameters()}
    assert not own & {id(p) for p in teacher.parameters()}


def test_fit_brings_the_student_to_the_teacher_and_leaves_the_teacher_alone() -> None:
    teacher, student = mlp(16), mlp(12, seed=1)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()
    data = [(randn(32, 6, seed=s), torch.zeros(32, dtype=torch.long)) for s in range(4)]
    student.eval()
    history = kdq.Distiller(teacher, student, [kdq.SoftTargets(T=2.0)]).fit(data, 40, lr=1e-2, progress=False)
    assert history.losses[-1] < 0.1 * history.losses[0]
    assert teacher.training, "modes are given back"
    assert not student.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(module._forward_hooks for module in (*teacher.modules(), *student.modules()))


@pytest.mark.parametrize("config", [kdq.Int8Dynamic(), kdq.LowBit(weight_bits=2, act_bits=3), kdq.Binary()], ids=str)
def test_quantized_students_train(config: Any) -> None:
    teacher, student = mlp(16), mlp(64, seed=1)
    kdq.prepare_qat_(student, config)
    data = [randn(64, 6, seed=s) for s in range(4)]
    history = kdq.Distiller(teacher, student, [kdq.SoftTargets(T=2.0)]).fit(data, 30, lr=1e-2, progress=False)
    assert history.losses[-1] < 0.7 * history.losses[0]
    kdq.convert_(student)
    assert student(data[0]).shape == (64, 4)


def test_batches_of_every_kind() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(8)

        def forward(self, features: Tensor) -> Tensor:
            y: Tensor = self.body(features)
            return y

    x, target = randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    distiller = kdq.Distiller(Model(), Model(), [kdq.SoftTargets(alpha=0.5)])
    assert torch.equal(distiller.loss((x, target)), distiller.loss({"features": x, "labels": target}))
    assert torch.isfinite(kdq.Distiller(Model(), Model(), [kdq.SoftTargets()]).loss(x))
    with pytest.raises(TypeError, match="batch"):
        distiller.loss(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kdq.Distiller(mlp(3), mlp(3), []), "losses"),
        (lambda: kdq.Distiller(mlp(3), mlp(3), [kdq.Hint({"nope": "0"})]), "student has no layer 'nope'"),
        (lambda: kdq.Distiller(mlp(3), mlp(3), [kdq.Hint({"0": "nope"})]), "teacher has no layer 'nope'"),
        (lambda: kdq.Distiller(mlp(3), mlp(3), [kdq.SoftTargets()]).fit([], 1, progress=False), "loader"),
        (lambda: kdq.Distiller(mlp(3), mlp(3), [kdq.SoftTargets()]).fit([randn(2, 6)], 0, progress=False), "epochs"),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_nan_loss_stops_before_the_step() -> None:
    student = mlp(3)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(RuntimeError, match="nan"):
        kdq.Distiller(mlp(3), student, [kdq.SoftTargets()]).fit([torch.full((2, 6), torch.nan)], 1, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


# ---- terms and their weights -----------------------------------------------------------------------------------------


def test_scheduled_terms_are_weighed_by_the_progress() -> None:
    teacher, student = mlp(16), mlp(5, seed=1)
    soft, labels = kdq.SoftTargets(), kdq.CrossEntropy()
    distiller = kdq.Distiller(
        teacher, student, [kdq.Weighted(soft, Linear(1.0, 0.0)), kdq.Weighted(labels, Step({0.0: 0, 0.5: 3}))]
    )
    x, target = randn(9, 6), torch.arange(9) % 4
    for progress, weights in [(0.0, (1, 0)), (0.25, (0.75, 0)), (0.5, (0.5, 3)), (1.0, (0, 3))]:
        distiller.progress = progress
        expected = weights[0] * soft(student(x), teacher(x)) + weights[1] * labels(student(x), None, target)
        torch.testing.assert_close(distiller.loss((x, target)), expected)


@pytest.mark.parametrize("sized", [True, False])
def test_fit_moves_the_progress(sized: bool) -> None:
    seen: list[float] = []

    def record(progress: float) -> float:
        seen.append(progress)
        return 1.0

    class Loader:
        def __iter__(self) -> Any:
            return iter([randn(3, 6)] * 2)

    distiller = kdq.Distiller(mlp(3), mlp(3, seed=1), [kdq.Weighted(kdq.SoftTargets(), record)])
    seen.clear()
    distiller.fit([randn(3, 6)] * 2 if sized else Loader(), 2, progress=False)
    assert seen == ([0.0, 0.25, 0.5, 0.75] if sized else [0.0, 0.0, 0.5, 0.75])


def test_the_teacher_rests_where_no_loss_needs_it() -> None:
    class Unasked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the teacher ran")

    losses = [kdq.CrossEntropy(), kdq.SoftTargets(alpha=0.0)]
    loss = kdq.Distiller(Unasked(), mlp(3), losses).loss((randn(4, 6), torch.tensor([0, 1, 2, 3])))
    assert loss.requires_grad


@pytest.mark.parametrize(
    "loss",
    [
        kdq.AttentionTransfer({"0": "0"}, weight=10.0),
        kdq.RelationalKD({"1": "1"}),
        kdq.ContrastiveKD({"1": "1"}, width=8, queue=16),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_feature_losses_train_through_the_distiller(loss: Any) -> None:
    def conv(channels: int, seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, channels, 3), nn.Flatten(), nn.Linear(channels * 9, 4))

    student = conv(3, 1)
    distiller = kdq.Distiller(conv(6, 0), student, [loss])
    before = [p.clone() for p in student.parameters()]
    history = distiller.fit([randn(8, 2, 5, 5, seed=s) for s in range(3)], 15, lr=1e-2, progress=False)
    assert history.losses[-1] < 0.8 * history.losses[0]
    assert not torch.equal(before[0], next(student.parameters()))
    heads = 4 if isinstance(loss, kdq.ContrastiveKD) else 0
    assert len(list(distiller.own_parameters())) == heads


@pytest.mark.parametrize("prepare", ["prepare_qat_", "prepare_switchable_"])
def test_an_optimizer_of_before_the_preparation_is_refused(prepare: str) -> None:
    student = mlp(3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    low = kdq.LowBit(weight_bits=2, act_bits=4)
    getattr(kdq, prepare)(student, low if prepare == "prepare_qat_" else [low, kdq.Binary()])
    distiller = kdq.Distiller(mlp(3), student, [kdq.SoftTargets()])
    with pytest.raises(ValueError, match="optimizer: it has the weight of '0', but not all of its learned scales"):
        distiller.fit([randn(2, 6)], 1, optimizer, progress=False)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.endswith(("weight", "bias")))
    distiller.fit([randn(2, 6)], 1, optimizer, progress=False)


def test_an_optimizer_without_the_teacher_that_trains_is_refused() -> None:
    student = mlp(3)
    distiller = kdq.Distiller(mlp(3), student, [kdq.SoftTargets()], train_teacher=True)
    with pytest.raises(ValueError, match="optimizer: it lacks the teacher"):
        distiller.fit([randn(2, 6)], 1, torch.optim.SGD(student.parameters(), lr=0.1), progress=False)


def test_an_optimizer_without_the_adapters_is_refused() -> None:
    distiller = kdq.Distiller(mlp(16), mlp(5, seed=1), [kdq.Hint({"0": "0"})])
    with pytest.raises(RuntimeError, match="prepare"):
        list(distiller.parameters())
    optimizer = torch.optim.SGD(distiller.student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer: it lacks the adapters"):
        distiller.fit([randn(3, 6)], 1, optimizer, progress=False)


# ---- fit -------------------------------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_step_of_their_mean() -> None:
    """Batches of 4, two a step and one left over, are the steps of batches of 8 and 4."""
    x = randn(12, 6)
    students = [mlp(5, seed=1) for _ in range(2)]
    for student, batches, accumulate in zip(students, [x.split(4), (x[:8], x[8:])], [2, 1], strict=True):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        history = kdq.Distiller(mlp(16), student, [kdq.SoftTargets()]).fit(
            batches, 1, optimizer, accumulate=accumulate, progress=False
        )
        assert history.steps == 2
    for a, b in zip(*(s.parameters() for s in students), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_may_be_around_the_whole_fit() -> None:
    """It keeps rounded weights until it ends: unless they are dropped, the student would stand still."""
    histories = []
    for outside in (True, False):
        student = mlp(12, seed=1)
        distiller = kdq.Distiller(mlp(16), student, [kdq.SoftTargets()])
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            history = distiller.fit([randn(32, 6)], 20, lr=1e-2, validation=[randn(32, 6)], progress=False)
        histories.append(history)
    rounded, plain = histories
    assert plain.losses[-1] < 0.5 * plain.losses[0]
    assert rounded.losses == pytest.approx(plain.losses, rel=0.1)
    assert rounded.validation[-1].teacher_kl == pytest.approx(plain.validation[-1].teacher_kl, rel=0.1)


def test_gradients_are_clipped_together() -> None:
    student = mlp(5, seed=1)
    before = [p.detach().clone() for p in student.parameters()]
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    kdq.Distiller(mlp(16), student, [kdq.SoftTargets()]).fit(
        [randn(8, 6)], 1, optimizer, clip_grad_norm=1e-3, progress=False
    )
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(student.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_validation_is_accuracy_and_kl_of_each_epoch() -> None:
    teacher, student = mlp(16), mlp(12, seed=1)
    held_out = [(randn(30, 6, seed=9), torch.arange(30) % 4), (randn(5, 6, seed=8), torch.tensor([0, -100, 1, 2, 3]))]
    history = kdq.Distiller(teacher, student, [kdq.SoftTargets()]).fit(
        [randn(32, 6)], 3, validation=held_out, progress=False
    )
    assert len(history.validation) == 3
    assert history.best_epoch is None
    last = history.validation[-1]
    x, y = torch.cat([x for x, _ in held_out]), torch.cat([y for _, y in held_out])
    x, y = x[y != -100], y[y != -100]
    p, q = teacher(x).double().log_softmax(1), student(x).double().log_softmax(1)
    assert last.accuracy == pytest.approx(float((q.argmax(1) == y).double().mean()))
    assert last.teacher_accuracy == pytest.approx(float((p.argmax(1) == y).double().mean()))
    assert last.teacher_kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean().detach()), rel=1e-5)
    unlabelled = kdq.Distiller(teacher, student, [kdq.SoftTargets()]).fit([x], 1, validation=[x], progress=False)
    assert unlabelled.validation[0].accuracy is None


def test_patience_stops_and_puts_the_best_weights_back() -> None:
    """A learning rate that makes the third epoch and all after it worse."""
    teacher, student = mlp(16), mlp(12, seed=1)
    x = randn(64, 6)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else -1.0)
    history = kdq.Distiller(teacher, student, [kdq.SoftTargets(T=1.0)]).fit(
        [x], 20, optimizer, scheduler=rates, validation=[x], patience=3, progress=False
    )
    assert history.best_epoch == 1
    assert len(history.losses) == 5
    best = min(found.teacher_kl for found in history.validation)
    assert float(kdq.SoftTargets(T=1.0)(student(x), teacher(x)).detach()) == pytest.approx(best, rel=1e-5)


def test_a_teacher_that_is_worse_is_named_once() -> None:
    x = randn(100, 6)
    student = mlp(12, seed=1)
    target = student(x).argmax(1)
    frozen = torch.optim.SGD(student.parameters(), lr=0.0)
    distiller = kdq.Distiller(mlp(16), student, [kdq.CrossEntropy()])
    with pytest.warns(UserWarning, match=r"teacher is worse.*accuracy \d+\.\d+%.*student's 100\.00%") as caught:
        distiller.fit([(x, target)], 3, frozen, validation=[(x, target)], progress=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the line that called fit"


@pytest.mark.parametrize(("ahead", "behind", "warns"), [(9, 2, True), (6, 3, False), (2, 9, False), (1, 0, False)])
def test_worse_is_more_than_two_standard_errors_of_the_pairs(ahead: int, behind: int, warns: bool) -> None:
    """Of 50 rows the student alone is right on `ahead`, the teacher alone on `behind`, both on the rest."""

    class Says(nn.Module):
        def __init__(self, wrong: slice) -> None:
            super().__init__()
            self.wrong = wrong

        def forward(self, x: Tensor) -> Tensor:
            right = torch.ones(len(x), dtype=torch.long)
            right[self.wrong] = 0
            return torch.eye(2)[right]

    found = validate(
        Says(slice(0, behind)), Says(slice(behind, behind + ahead)), [(randn(50, 1), torch.ones(50).long())]
    )
    d = torch.tensor([-1.0] * behind + [1.0] * ahead + [0.0] * (50 - ahead - behind)).double()
    assert found.lead == pytest.approx(float(d.mean() / (d.std() / 50**0.5)))
    assert ((found.lead or 0) > 2) == warns
    if warns:
        with pytest.warns(UserWarning, match="worse"):
            assert found.warn_of_worse_teacher()
    else:
        assert not found.warn_of_worse_teacher()


class Shrinking:
    """A loader that gives one batch less in each epoch."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        self.batches -= 1
        return iter([randn(2, 6)] * (self.batches + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loader": iter([randn(2, 6)]), "epochs": 2}, r"loader: 2 epochs need all.*an iterator \(list_iterator\)"),
        ({"loader": iter([])}, r"loader: it gave no batch \("),
        ({"loader": Shrinking(1), "epochs": 2}, "loader: it gave no batch in epoch 2"),
        ({"loader": Shrinking(3), "epochs": 2}, "loader: expected 3 batches as in the first epoch, got 2 in epoch 2"),
        ({"patience": 2}, "patience.*validation"),
        ({"patience": 0, "validation": [randn(2, 6)]}, "patience: expected at least 1"),
        ({"accumulate": 0}, "accumulate"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm"),
        ({"validation": []}, "validation: expected at least one batch"),
    ],
)
def test_mistakes_in_fit_are_named(options: dict[str, Any], message: str) -> None:
    arguments = {"loader": [randn(2, 6)], "epochs": 1, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        kdq.Distiller(mlp(3), mlp(3, seed=1), [kdq.SoftTargets()]).fit(**arguments)


def test_an_iterator_costs_no_training() -> None:
    """Neither in one fit nor in phases; a sized one may rewind itself."""

    class Rewinding:
        def __iter__(self) -> Any:
            self.left = 2
            return self

        def __len__(self) -> int:
            return 2

        def __next__(self) -> Any:
            if self.left == 0:
                raise StopIteration
            self.left -= 1
            return randn(2, 6, seed=self.left)

    student = mlp(3, seed=1)
    before = copy.deepcopy(student.state_dict())
    distiller = kdq.Distiller(mlp(3), student, [kdq.SoftTargets()])
    phases = [kdq.Phase(name, 1) for name in ("one", "two")]
    batches = [randn(2, 6)] * 3
    for argument, given in (
        ("loader", lambda: {"loader": iter(batches)}),
        ("validation", lambda: {"loader": batches, "validation": iter(batches)}),
    ):
        for train in (
            lambda data: distiller.fit(**data, epochs=2, progress=False),
            lambda data: distiller.run(**data, phases=phases, progress=False),
        ):
            with pytest.raises(ValueError, match=rf"{argument}: 2 .* need all batches each, but an iterator \(list_it"):
                train(given())
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert distiller.fit(Rewinding(), 3, validation=Rewinding(), progress=False).steps == 6
    once = iter(batches)
    assert len(distiller.fit(batches, 1, validation=once, progress=False).validation) == 1


def test_outputs_of_different_shape_are_named() -> None:
    wide = nn.Linear(6, 7)
    with pytest.raises(ValueError, match=r"one shape.*\[2, 4\] and \[2, 7\]"):
        kdq.Distiller(wide, mlp(3), [kdq.SoftTargets()]).loss(randn(2, 6))
