"""The losses against plain formulas in float64, alone and as they leave rows out, and errors that name their cause."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdq
from kdq.losses import Cosine, Linear, Step
from kdq.losses.features import ContrastiveHeads
from small_models import randn


def plain_soft_targets(
    student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float, alpha: float
) -> float:
    """The formula, element by element in float64."""
    total, rows = 0.0, 0
    for i in range(len(student)):
        if target is not None and target[i] == -100:
            continue
        p = torch.softmax(teacher[i].double() / temperature, 0)
        q = torch.softmax(student[i].double() / temperature, 0)
        value = alpha * temperature**2 * float((p * (p.log() - q.log())).sum())
        if target is not None:
            value -= (1 - alpha) * float(torch.log_softmax(student[i].double(), 0)[target[i]])
        total, rows = total + value, rows + 1
    return total / rows


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ignored", [False, True])
def test_soft_targets_is_the_formula(temperature: float, alpha: float, ignored: bool) -> None:
    student, teacher = randn(7, 5) * 3, randn(7, 5, seed=1) * 3
    target = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    if ignored:
        target[2] = target[5] = -100
    loss = kdq.SoftTargets(T=temperature, alpha=alpha)(student, teacher, target)
    assert float(loss) == pytest.approx(plain_soft_targets(student, teacher, target, temperature, alpha), rel=1e-5)


def test_soft_targets_without_labels() -> None:
    student, teacher = randn(7, 5), randn(7, 5, seed=1)
    loss = kdq.SoftTargets(T=2.0, alpha=1.0)(student, teacher)
    assert float(loss) == pytest.approx(plain_soft_targets(student, teacher, None, 2.0, 1.0), rel=1e-5)
    assert float(kdq.SoftTargets(T=2.0, alpha=1.0)(teacher, teacher)) == pytest.approx(0, abs=1e-7)
    with pytest.raises(ValueError, match="alpha"):
        kdq.SoftTargets(alpha=0.5)(student, teacher)


def probabilities(logits: Tensor, temperature: float = 1.0) -> list[float]:
    return torch.softmax(logits.double() / temperature, 0).tolist()


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def plain_reverse(student: Tensor, teacher: Tensor, label: int) -> float:
    return 9 * kl(probabilities(student, 3), probabilities(teacher, 3))


def plain_js(student: Tensor, teacher: Tensor, label: int) -> float:
    p, q = probabilities(teacher, 3), probabilities(student, 3)
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return 9 * (kl(p, m) + kl(q, m)) / 2


def plain_standardized(student: Tensor, teacher: Tensor, label: int) -> float:
    def z(logits: Tensor) -> Tensor:
        values = logits.double()
        return (values - values.mean()) / math.sqrt(float((values - values.mean()).square().mean()))

    soft = 4 * kl(probabilities(z(teacher), 2), probabilities(z(student), 2))
    return 0.7 * soft - 0.3 * math.log(probabilities(student)[label])


def plain_decoupled(student: Tensor, teacher: Tensor, label: int) -> float:
    p, q = probabilities(teacher, 2), probabilities(student, 2)
    target_part = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    others = [i for i in range(len(p)) if i != label]
    other_part = kl([p[i] / (1 - p[label]) for i in others], [q[i] / (1 - q[label]) for i in others])
    return 4 * (1.5 * target_part + 6 * other_part)


def plain_regression(student: Tensor, teacher: Tensor, label: int) -> float:
    return float((student.double() - teacher.double()).square().sum()) / 2


def plain_smoothed(student: Tensor, teacher: Tensor, label: int) -> float:
    logs = [math.log(q) for q in probabilities(student)]
    return -(0.8 * logs[label] + 0.2 * sum(logs) / len(logs))


LOGIT_LOSSES: list[tuple[Any, Any]] = [
    (kdq.SoftTargets(T=3, divergence="reverse"), plain_reverse),
    (kdq.SoftTargets(T=3, divergence="js"), plain_js),
    (kdq.SoftTargets(T=2, alpha=0.7, standardize=True), plain_standardized),
    (kdq.DecoupledKD(T=2, alpha=1.5, beta=6), plain_decoupled),
    (kdq.LogitRegression(), plain_regression),
    (kdq.CrossEntropy(), lambda s, t, label: -math.log(probabilities(s)[label])),
    (kdq.CrossEntropy(label_smoothing=0.2), plain_smoothed),
]


@pytest.mark.parametrize(("loss", "plain"), LOGIT_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_losses_on_logits_are_their_formulas(loss: Any, plain: Any, dtype: torch.dtype) -> None:
    """On tokens `[2, 4, C]`, of which two are left out."""
    student, teacher = (randn(2, 4, 5) * 3).to(dtype), (randn(2, 4, 5, seed=1) * 3).to(dtype)
    target = torch.tensor([[0, 1, -100, 3], [4, -100, 1, 2]])
    rows = [(i, j) for i in range(2) for j in range(4) if target[i, j] != -100]
    expected = sum(plain(student[i, j], teacher[i, j], int(target[i, j])) for i, j in rows) / len(rows)
    student.requires_grad_()
    teacher.requires_grad_()
    value = loss(student, teacher, target)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Standard deviations have 1e-7 added, so that rows of equal logits have one.
    assert float(value.detach()) == pytest.approx(expected, rel=1e-6 if dtype == torch.float64 else 2e-5)
    value.backward()
    assert teacher.grad is None
    ignored = target == -100
    assert torch.equal(student.grad[ignored], torch.zeros_like(student.grad[ignored]))
    assert bool((student.grad[~ignored].abs().sum(-1) > 0).all())


@pytest.mark.parametrize("loss", [loss for loss, _ in LOGIT_LOSSES], ids=str)
def test_all_rows_ignored_is_zero_with_a_gradient(loss: Any) -> None:
    student = randn(3, 5).requires_grad_()
    value = loss(student, randn(3, 5), torch.full((3,), -100))
    value.backward()
    assert float(value.detach()) == 0
    assert torch.equal(student.grad, torch.zeros(3, 5))


@pytest.mark.parametrize("loss", [loss for loss, _ in LOGIT_LOSSES], ids=str)
def test_gradients_are_those_of_the_loss(loss: Any) -> None:
    student, teacher = randn(3, 4).double().requires_grad_(), randn(3, 4, seed=1).double()
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, torch.tensor([0, -100, 3])), (student,))


def test_soft_targets_of_rows_that_are_flat_or_ruled_out() -> None:
    flat = torch.zeros(2, 4, requires_grad=True)
    kdq.SoftTargets(standardize=True)(flat, randn(2, 4)).backward()
    assert torch.isfinite(flat.grad).all()
    teacher = torch.tensor([[0.0, 1.0, -torch.inf]])
    student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    value = kdq.SoftTargets(T=1, divergence="js")(student, teacher)
    value.backward()
    assert 0 < float(value.detach()) < math.log(2)
    assert torch.isfinite(student.grad).all()
    assert kdq.SoftTargets(divergence="reverse")(student, teacher) == torch.inf


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_a_class_that_both_rule_out_does_not_count(divergence: Any) -> None:
    """As the padding of a vocabulary."""
    student, teacher = randn(3, 5).double().requires_grad_(), randn(3, 5, seed=1).double()
    loss = kdq.SoftTargets(T=2, divergence=divergence)
    (expected,) = torch.autograd.grad(loss(student, teacher), student)

    def padded(logits: Tensor) -> Tensor:
        return F.pad(logits, (0, 1), value=-torch.inf)

    value = loss(padded(student), padded(teacher))
    torch.testing.assert_close(value, loss(student, teacher))
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], expected)


# ---- features --------------------------------------------------------------------------------------------------------


def plain_attention(student: Tensor, teacher: Tensor) -> float:
    def attention(features: Tensor) -> Tensor:
        q = features.double().square().sum(0).flatten()
        return q / math.sqrt(float(q.square().sum()))

    pairs = [attention(s) - attention(t) for s, t in zip(student, teacher, strict=True)]
    return sum(float(d.square().mean()) for d in pairs) / len(pairs)


def huber(d: float) -> float:
    return d * d / 2 if abs(d) < 1 else abs(d) - 0.5


def plain_relations(student: Tensor, teacher: Tensor) -> float:
    n = len(student)
    s, t = student.double().flatten(1), teacher.double().flatten(1)

    def distances(x: Tensor) -> dict[tuple[int, int], float]:
        raw = {(i, j): float((x[i] - x[j]).norm()) for i, j in itertools.product(range(n), repeat=2)}
        mean = sum(raw.values()) / (n * n - n)
        return {pair: d / mean for pair, d in raw.items()}

    def cosine(x: Tensor, i: int, j: int, k: int) -> float:
        if i in (j, k):
            return 0.0
        a, b = x[j] - x[i], x[k] - x[i]
        return float(a @ b / (a.norm() * b.norm()))

    ds, dt = distances(s), distances(t)
    far = sum(huber(ds[pair] - dt[pair]) for pair in ds) / n**2
    turned = sum(huber(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in itertools.product(range(n), repeat=3)) / n**3
    return 25 * far + 50 * turned


def plain_contrast(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for i in range(len(student)):
        a = student[i].double()
        scores = [float(a @ b / (a.norm() * b.norm())) / 0.07 for b in teacher.double()]
        total += math.log(sum(math.exp(x) for x in scores)) - scores[i]
    return total / len(student)


def plain_hint(student: Tensor, teacher: Tensor) -> float:
    return float((student.double() - teacher.double()).square().mean())


@pytest.mark.parametrize(
    ("loss", "plain", "shapes"),
    [
        (kdq.Hint({"a": "b"}, weight=2.0), plain_hint, [(6, 3, 4), (6, 3, 4)]),
        (kdq.AttentionTransfer({"a": "b"}, weight=2.0), plain_attention, [(6, 3, 4, 2), (6, 5, 4, 2)]),
        (kdq.RelationalKD({"a": "b"}, weight=2.0), plain_relations, [(6, 3, 2), (6, 7)]),
        (kdq.ContrastiveKD({"a": "b"}, weight=2.0), plain_contrast, [(6, 8), (6, 8)]),
    ],
    ids=["hint", "attention", "relations", "contrast"],
)
def test_losses_on_features_are_their_formulas(loss: Any, plain: Any, shapes: Any) -> None:
    student, teacher = randn(*shapes[0]).requires_grad_(), randn(*shapes[1], seed=1).requires_grad_()
    value = loss({"a": student}, {"b": teacher})
    assert float(value.detach()) == pytest.approx(2 * plain(student.detach(), teacher.detach()), rel=2e-5)
    value.backward()
    assert teacher.grad is None
    assert torch.isfinite(student.grad).all()
    target = torch.tensor([0, -100, 1, 2, -100, 0])
    kept = target != -100
    left_out = loss({"a": student}, {"b": teacher}, target)
    torch.testing.assert_close(left_out, loss({"a": student[kept]}, {"b": teacher[kept]}))
    nothing = loss({"a": student}, {"b": teacher}, torch.full((6,), -100))
    assert float(nothing.detach()) == 0
    assert nothing.requires_grad


def test_equal_samples_have_finite_relations() -> None:
    student = torch.ones(3, 4, requires_grad=True)
    kdq.RelationalKD({"a": "b"})({"a": student}, {"b": randn(3, 4)}).backward()
    assert torch.isfinite(student.grad).all()


def test_attention_over_tokens_sums_the_last_axis() -> None:
    student, teacher = randn(2, 5, 3), randn(2, 5, 7, seed=1)
    loss = kdq.AttentionTransfer({"a": "b"}, channel_axis=-1)({"a": student}, {"b": teacher})
    assert float(loss) == pytest.approx(plain_attention(student.mT, teacher.mT), rel=1e-5)


def test_hints_leave_out_tokens_and_samples() -> None:
    student, teacher = randn(2, 3, 4), randn(2, 3, 6, seed=1)
    hint = kdq.Hint({"a": "b"})
    adapter = hint.adapter(student, teacher)
    assert adapter is not None
    target = torch.tensor([[0, -100, 1], [-100, -100, -100]])
    loss = hint({"a": student}, {"b": teacher}, target, {"a": adapter})
    kept = target != -100
    expected = (adapter(student, teacher)[0] - teacher)[kept].square().mean()
    torch.testing.assert_close(loss, expected)
    per_sample = kdq.Hint({"a": "b"})({"a": randn(2, 8)}, {"b": randn(2, 8, seed=1)}, target)
    torch.testing.assert_close(per_sample, F.mse_loss(randn(2, 8)[:1], randn(2, 8, seed=1)[:1]))


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_regressors_map_channels_or_the_last_axis(axis: int) -> None:
    shape = [2, 3, 4, 5]
    wide = list(shape)
    wide[axis] = 9
    student, teacher = randn(*shape), randn(*wide)
    if axis == 2:
        with pytest.raises(ValueError, match="axis 1 or the last axis"):
            kdq.Hint({"a": "b"}).adapter(student, teacher)
        return
    adapter = kdq.Hint({"a": "b"}).adapter(student, teacher)
    assert adapter is not None
    assert adapter(student, teacher)[0].shape == teacher.shape


def test_the_queue_is_bounded_trained_through_and_filled_only_in_training() -> None:
    heads = ContrastiveHeads(4, 6, 3, size=5)
    a, b, c = (randn(3, 6, seed=s) for s in range(3))
    ours, theirs = heads(randn(3, 4), a)
    assert ours.shape == theirs.shape == (3, 3)
    _, theirs = heads(randn(3, 4), b)
    torch.testing.assert_close(theirs, heads.teacher(torch.cat([b, a])))
    assert torch.equal(heads.queue, torch.cat([b, a])[:5])
    with torch.no_grad():
        heads(randn(3, 4), c)
    heads.eval()(randn(3, 4), c)
    assert torch.equal(heads.queue, torch.cat([b, a])[:5])
    assert not heads.queue.requires_grad
    heads.train()(randn(3, 4), b)
    theirs = heads(randn(3, 4), b)[1]
    torch.testing.assert_close(theirs, heads.teacher(torch.cat([b, a])[:5]))
    assert torch.equal(heads.queue, torch.cat([b, a])[:5]), "a batch that comes again is there once"


@pytest.mark.parametrize(
    "loss",
    [kdq.Hint({"a": "b"}), kdq.RelationalKD({"a": "b"}), kdq.ContrastiveKD({"a": "b"}, width=4)],
    ids=lambda loss: type(loss).__name__,
)
def test_features_are_compared_in_float32_under_autocast(loss: Any) -> None:
    student, teacher = randn(6, 5).bfloat16(), randn(6, 8, seed=1).bfloat16()
    adapter = loss.adapter(student, teacher)
    adapters = {} if adapter is None else {"a": adapter.eval()}
    expected = loss({"a": student.float()}, {"b": teacher.float()}, None, adapters)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss({"a": student}, {"b": teacher}, None, adapters), expected)


def test_a_loss_of_ones_own_on_features() -> None:
    class Cosine(kdq.FeatureLoss):
        def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
            return 1 - F.cosine_similarity(student, teacher).mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x = randn(3, 4)
    loss = kdq.Distiller(model, model, [Cosine({"0": "1"})])
    with pytest.raises((ValueError, RuntimeError)):
        loss.loss(x)  # widths differ, and there is no adapter
    assert float(kdq.Distiller(model, model, [Cosine({"0": "0"})]).loss(x).detach()) == pytest.approx(0, abs=1e-6)


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_schedules_by_progress() -> None:
    assert [Linear(2, 0)(p) for p in (0.0, 0.25, 1.0)] == [2, 1.5, 0]
    assert [Cosine(2, 0)(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([2, 1, 0])
    assert Cosine(2, 0)(0.25) == pytest.approx(1 + math.cos(math.pi / 4))
    assert [Step({0.0: 1, 0.5: 0})(p) for p in (0.0, 0.49, 0.5, 1.0)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kdq.Hint({}), "layers"),
        (lambda: kdq.Hint({"a": "b"}, weight=-1), "weight"),
        (lambda: kdq.SoftTargets(T=0.0), "T"),
        (lambda: kdq.SoftTargets(alpha=1.5), "alpha"),
        (lambda: kdq.SoftTargets(divergence="kl"), "divergence.*forward, reverse, js"),
        (lambda: kdq.SoftTargets()(randn(3, 4), randn(3, 5)), "shape"),
        (lambda: kdq.SoftTargets(alpha=0.5)(randn(3, 4), randn(3, 4), torch.tensor([0, 1])), "target"),
        (lambda: kdq.SoftTargets(alpha=0.5)(randn(2, 4), randn(2, 4), torch.tensor([0, 9])), "target"),
        (lambda: kdq.DecoupledKD(beta=-1.0), "beta"),
        (lambda: kdq.DecoupledKD()(randn(2, 4), randn(2, 4)), "target.*none"),
        (lambda: kdq.DecoupledKD()(randn(2, 1), randn(2, 1), torch.tensor([0, 0])), "2 classes"),
        (lambda: kdq.LogitRegression()(randn(2, 4), randn(2, 3)), "shape"),
        (lambda: kdq.CrossEntropy(label_smoothing=1.0), "label_smoothing"),
        (lambda: kdq.CrossEntropy()(randn(2, 4), randn(2, 4)), "target.*none"),
        (lambda: kdq.RelationalKD({"a": "b"}, angle_weight=-1), "angle_weight"),
        (lambda: kdq.ContrastiveKD({"a": "b"}, queue=-1), "queue"),
        (lambda: kdq.ContrastiveKD({"a": "b"}, T=0), "T"),
        (lambda: kdq.Hint({"a": "b"})({"a": randn(2, 3)}, {"b": randn(2, 4)}), "Hint 'a' -> 'b': expected.*shape"),
        (lambda: kdq.AttentionTransfer({"a": "b"})({"a": randn(2, 3)}, {"b": randn(2, 3)}), "positions"),
        (
            lambda: kdq.RelationalKD({"a": "b"})({"a": randn(5, 3)}, {"b": randn(5, 3)}, torch.tensor([0, -100])),
            r"RelationalKD 'a' -> 'b'.*\[2, ...\].*\[5, 3\]",
        ),
        (lambda: Step({0.5: 1}), "values"),
        (lambda: kdq.Weighted(kdq.SoftTargets(), -1.0), "weight"),
        (lambda: kdq.Weighted(kdq.SoftTargets(), Linear(1, -1)).at(1.0), "weight.*progress 1.000"),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_do_not_nest() -> None:
    with pytest.raises(TypeError, match="loss"):
        kdq.Weighted(kdq.Weighted(kdq.SoftTargets()))
