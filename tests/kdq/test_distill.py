"""The distiller: what it sums, what it trains and leaves alone, validation, and errors that name their cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))


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
