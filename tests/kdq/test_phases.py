"""Training in phases: what each phase trains, precision that falls on the way, and teachers made of other models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
from small_models import mlp, randn

LOW = kdq.LowBit(weight_bits=2, act_bits=3)
HIGH = kdq.LowBit(weight_bits=4, act_bits=4)


def labelled(seed: int = 0) -> tuple[Tensor, Tensor]:
    return randn(24, 6, seed=seed), torch.arange(24) % 4


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_qkd_trains_the_teacher_in_co_study_alone() -> None:
    teacher, student = mlp(16), mlp(12, seed=1)
    kdq.prepare_qat_(student, HIGH)
    teacher.eval()
    distiller = kdq.Distiller(teacher, student, [kdq.SoftTargets()])
    changed = []
    for phase in kdq.qkd_phases((2, 3, 2), T=2.0, lr=1e-2):
        before = state(teacher), state(student)
        (history,) = distiller.run([labelled()], [phase], progress=False)
        assert len(history.losses) == phase.epochs
        changed.append(
            [
                not all(torch.equal(v, b[k]) for k, v in m.state_dict().items())
                for m, b in zip((teacher, student), before, strict=True)
            ]
        )
    assert changed == [[False, True], [True, True], [False, True]]
    assert not teacher.training


def test_co_study_is_each_others_loss() -> None:
    """Both gradients are those of labels plus the other's soft targets as constants."""
    teacher, student = mlp(16), mlp(12, seed=1)
    x, target = labelled()
    losses = [kdq.CrossEntropy(), kdq.Weighted(kdq.SoftTargets(T=2.0), 0.5)]
    distiller = kdq.Distiller(teacher, student, losses, train_teacher=True)
    parameters = list(distiller.parameters())
    assert len(parameters) == 8
    grads = torch.autograd.grad(distiller.loss((x, target)), parameters)
    expected: list[Tensor] = []
    for model, other in ((student, teacher), (teacher, student)):
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, target) + 0.5 * kdq.SoftTargets(T=2.0)(logits, other(x).detach())
        expected += torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_precision_falls_from_phase_to_phase() -> None:
    teacher, student = mlp(16), mlp(12, seed=1)
    kdq.prepare_qat_(student, kdq.Int8Dynamic())
    phases = [kdq.Phase("8", 2), kdq.Phase("4", 2, config=HIGH), kdq.Phase("2", 2, lr=1e-2, config={"0": LOW})]
    histories = kdq.Distiller(teacher, student, [kdq.SoftTargets()]).run([randn(24, 6)], phases, progress=False)
    assert [len(h.losses) for h in histories] == [2, 2, 2]
    report = kdq.convert_(student)
    assert report.changed == {"0": LOW, "2": HIGH}


def test_a_config_that_fits_no_twin_shows_before_anything_is_trained() -> None:
    student = mlp(3)
    kdq.prepare_qat_(student, HIGH)
    before = state(student)
    phases = [kdq.Phase("a", 1), kdq.Phase("b", 1, config={"nope": LOW})]
    with pytest.raises(ValueError, match="config: 'nope' is neither"):
        kdq.Distiller(mlp(3), student, [kdq.SoftTargets()]).run([randn(9, 6)], phases, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_adapters_stay_where_the_losses_do() -> None:
    distiller = kdq.Distiller(mlp(16), mlp(5, seed=1), [kdq.Hint({"0": "0"})])
    distiller.prepare(randn(3, 6))
    adapter = distiller.adapters[0, "0"]
    before = state(adapter)
    distiller.run([randn(3, 6)], [kdq.Phase("a", 1), kdq.Phase("b", 1)], progress=False)
    assert distiller.adapters[0, "0"] is adapter
    assert not torch.equal(before["linear.weight"], adapter.state_dict()["linear.weight"])


# ---- lower_precision_ ------------------------------------------------------------------------------------------------


def test_lower_precision_is_a_fresh_twin_of_the_trained_weights() -> None:
    student = mlp(12, seed=1)
    kdq.prepare_qat_(student, HIGH)
    kdq.Distiller(mlp(16), student, [kdq.SoftTargets()]).fit([randn(24, 6)], 3, lr=1e-2, progress=False)
    plain = nn.Sequential(*(m.to_float() if hasattr(m, "to_float") else m for m in copy.deepcopy(student)))
    expected = copy.deepcopy(plain)
    kdq.prepare_qat_(expected, LOW)
    weights = [p for m in (student[0], student[2]) for p in (m.weight, m.bias)]
    report = kdq.lower_precision_(student, LOW)
    assert report.changed == {"0": LOW, "2": LOW}
    x = randn(24, 6, seed=3) * 2
    assert torch.equal(student(x), expected(x)), "the first batch initialises the activations"
    assert all(
        a is b for a, b in zip(weights, [p for m in (student[0], student[2]) for p in (m.weight, m.bias)], strict=True)
    )
    kdq.convert_(student)
    torch.testing.assert_close(student(x), expected(x))


def test_lower_precision_is_all_or_nothing() -> None:
    student = mlp(12, seed=1)
    with pytest.raises(ValueError, match="prepare_qat_"):
        kdq.lower_precision_(student, LOW)
    kdq.prepare_qat_(student, HIGH)
    with pytest.raises(ValueError, match="config: 'nope' is neither"):
        kdq.lower_precision_(student, {"nope": LOW})
    twins = list(student)
    with torch.no_grad():
        student[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="2: its weight contains NaN"):
        kdq.lower_precision_(student, LOW)
    assert all(a is b for a, b in zip(twins, student, strict=True))


def test_a_shared_twin_stays_shared() -> None:
    shared = nn.Linear(6, 6)
    student = nn.Sequential(shared, nn.ReLU(), shared)
    kdq.prepare_qat_(student, HIGH)
    kdq.lower_precision_(student, kdq.Binary())
    assert student[0] is student[2]
    assert type(student[0]).__name__ == "BinaryQATLinear"


# ---- teachers --------------------------------------------------------------------------------------------------------


def test_an_ensemble_averages_probabilities_or_logits() -> None:
    a, b, x = mlp(8), mlp(9, seed=1), randn(5, 6)
    p, q = (m(x).double().softmax(-1) for m in (a, b))
    mean = kdq.TeacherEnsemble([a, b], weights=[3, 1])(x)
    torch.testing.assert_close(mean.double().softmax(-1), 0.75 * p + 0.25 * q, rtol=1e-5, atol=1e-6)
    logits = kdq.TeacherEnsemble([a, b], average="logits")(x)
    torch.testing.assert_close(logits, (a(x) + b(x)) / 2)
    dead = nn.Module()
    dead.forward = lambda x: torch.tensor([[0.0, -torch.inf]])  # type: ignore[method-assign, assignment]
    assert kdq.TeacherEnsemble([dead, dead])(x)[0, 1] == -torch.inf, "a class that all rule out stays so"


def test_hints_and_training_reach_into_an_ensemble() -> None:
    ensemble, student = kdq.TeacherEnsemble([mlp(8), mlp(9, seed=1)]), mlp(5, seed=2)
    hints = kdq.Hint({"0": "teachers.1.0"})
    history = kdq.Distiller(ensemble, student, [kdq.SoftTargets(), hints]).fit(
        [randn(9, 6)], 20, lr=1e-2, progress=False
    )
    assert history.losses[-1] < 0.8 * history.losses[0]


def test_a_float_model_teaches_its_low_bit_self() -> None:
    model = mlp(32)
    teacher = kdq.self_teacher(model)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    before = state(teacher)
    kdq.prepare_qat_(model, LOW)
    history = kdq.Distiller(teacher, model, [kdq.SoftTargets(T=2)]).fit([randn(64, 6)], 30, lr=1e-2, progress=False)
    assert history.losses[-1] < 0.5 * history.losses[0]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kdq.Phase("a", 0), "epochs"),
        (lambda: kdq.Phase("a", 1, lr=0.0), "lr"),
        (lambda: kdq.qkd_phases((1, 2)), r"epochs.*three.*\(1, 2\)"),  # type: ignore[arg-type]
        (lambda: kdq.TeacherEnsemble([]), "teachers"),
        (lambda: kdq.TeacherEnsemble([mlp(3)], weights=[0.0]), "weights"),
        (lambda: kdq.TeacherEnsemble([mlp(3)], average="votes"), "average"),
        (lambda: kdq.TeacherEnsemble([mlp(3), nn.Linear(6, 2)])(randn(2, 6)), r"one shape.*\[2, 4\], \[2, 2\]"),
        (lambda: kdq.self_teacher(prepared()), "'0' is already a LowBitQATLinear"),
        (lambda: run(kdq.Phase("a", 1), kdq.Phase("b", 1, losses=[kdq.Hint({"x": "0"})])), "no layer 'x'"),
        (lambda: run(kdq.Phase("a", 1), optimizer=None), "optimizer"),
        (lambda: run(kdq.Phase("a", 1, train_teacher=True)), "train_teacher: no parameter"),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_wrong_config_is_an_error_of_the_phase() -> None:
    wrong: Any = 4
    with pytest.raises(TypeError, match="config"):
        kdq.Phase("a", 1, config=wrong)


def prepared() -> nn.Module:
    model = mlp(3)
    kdq.prepare_qat_(model, LOW)
    return model


def run(*phases: kdq.Phase, **options: Any) -> None:
    distiller = kdq.Distiller(kdq.self_teacher(mlp(3)), mlp(3, seed=1), [kdq.SoftTargets()])
    distiller.run([randn(3, 6)], phases, progress=False, **options)
