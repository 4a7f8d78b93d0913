"""SwitchableDistiller: a step is what its papers say, every precision comes nearer to the teacher, plans train on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kdq
from kdq.configs import Config
from small_models import FOUR, INT8, MIXED, ONE, PRECISIONS, TWO, normed_mlp, randn


def switchable() -> nn.Sequential:
    """Untrained, with its activation grids initialized."""
    model = normed_mlp(seed=1)
    kdq.prepare_switchable_(model, PRECISIONS)
    for precision in reversed(PRECISIONS):
        kdq.set_precision_(model, precision)
        model(randn(32, 12))
    return model


def test_a_step_is_the_sandwich_and_recursive() -> None:
    """The loss against its formula: each precision run by itself, with a batch norm that must be in eval to compare."""
    teacher, model = normed_mlp().eval(), switchable().eval()
    x, target = randn(9, 12), torch.tensor([0, 1, 2, 3, 4, 0, 1, -100, 3])
    soft = kdq.SoftTargets(T=2.0, alpha=0.7)
    for recursive in (True, False):
        distiller = kdq.SwitchableDistiller(teacher, model, [soft], recursive=recursive, seed=3)
        ran = kdq.SwitchableDistiller(teacher, model, [soft], seed=3).draw()
        assert (ran[0], ran[-1], len(ran)) == (INT8, ONE, 3)
        expected, goal = torch.tensor(0.0), teacher(x)
        for precision in ran:
            kdq.set_precision_(model, precision)
            logits = model(x)
            expected = expected + soft(logits, goal, target)
            goal = logits.detach() if recursive else goal
        kdq.set_precision_(model, MIXED)
        torch.testing.assert_close(distiller.loss((x, target)), expected)
        assert kdq.precision_of(model) == MIXED


def test_draws_cover_all_and_follow_the_seed() -> None:
    model = switchable()

    def draws(seed: int, sandwich: int = 1) -> list[list[Config]]:
        distiller = kdq.SwitchableDistiller(normed_mlp(), model, [kdq.SoftTargets()], sandwich=sandwich, seed=seed)
        return [distiller.draw() for _ in range(12)]

    assert {step[1] for step in draws(0)} == {FOUR, TWO}
    assert draws(0) == draws(0) != draws(1)
    assert draws(0, sandwich=7) == [PRECISIONS] * 12
    with pytest.raises(ValueError, match="sandwich"):
        draws(0, sandwich=0)
    with pytest.raises(ValueError, match="prepare_switchable_"):
        kdq.SwitchableDistiller(normed_mlp(), normed_mlp(), [kdq.SoftTargets()])


def test_phases_keep_the_sandwich() -> None:
    model = switchable()
    distiller = kdq.SwitchableDistiller(normed_mlp(), model, [kdq.SoftTargets()], sandwich=7)
    before = copy.deepcopy(model.state_dict())
    distiller.run([randn(32, 12)], [kdq.Phase("labels", 1, [kdq.SoftTargets(T=1)])], progress=False)
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    for key in ("Int8Dynamic", "LowBit_4_8", "LowBit_2_4", "Binary"):
        assert f"3.variants.{key}.running_mean" in moved
    for phase in (kdq.Phase("a", 1, config=TWO), kdq.Phase("b", 1, train_teacher=True)):
        with pytest.raises(ValueError, match="SwitchableDistiller does not take"):
            distiller.run([randn(32, 12)], [phase], progress=False)
    with pytest.raises(ValueError, match="'1' holds its precisions already"):
        kdq.lower_precision_(model, TWO)


def test_preparing_draws_nothing() -> None:
    losses = [kdq.Hint({"1": "1"})]
    prepared, other = (kdq.SwitchableDistiller(normed_mlp(), switchable(), losses) for _ in range(2))
    prepared.prepare(randn(9, 12))
    assert [prepared.draw() for _ in range(8)] == [other.draw() for _ in range(8)]


def test_contrast_does_not_take_a_batch_for_its_own_negatives() -> None:
    """Each precision of a step sees the same batch."""
    loss = kdq.ContrastiveKD({"1": "1"}, width=8, queue=32)
    model, x = switchable().eval(), randn(9, 12)
    distiller = kdq.SwitchableDistiller(normed_mlp(), model, [loss], sandwich=7)
    distiller.prepare(x)
    heads = distiller.adapters[0, "1"]
    fresh = copy.deepcopy(heads)
    total = distiller.loss(x)
    assert len(heads.queue) == 9
    expected = torch.tensor(0.0)
    teacher = normed_mlp().eval()
    for precision in PRECISIONS:
        kdq.set_precision_(model, precision)
        ours = model[:2](x)
        expected = expected + loss({"1": ours}, {"1": teacher[:2](x)}, None, {"1": copy.deepcopy(fresh)})
    torch.testing.assert_close(total, expected)


def test_fit_brings_every_precision_nearer_and_is_deterministic() -> None:
    def run() -> tuple[nn.Module, list[float], list[float]]:
        teacher, model = normed_mlp(), normed_mlp(seed=1)
        kdq.prepare_switchable_(model, PRECISIONS)
        kdq.set_precision_(model, TWO)
        hint = kdq.Hint({"1": "1"}, weight=0.1)
        distiller = kdq.SwitchableDistiller(teacher, model, [kdq.SoftTargets(), hint])
        loader = [(randn(32, 12, seed=s), torch.zeros(32, dtype=torch.long)) for s in range(8)]
        first = distances(teacher, model)
        distiller.fit(loader, 8, lr=1e-2, progress=False)
        assert set(kdq.precision_of(model).values()) == {TWO}
        return model, first, distances(teacher, model)

    def distances(teacher: nn.Module, model: nn.Module) -> list[float]:
        x, found = randn(200, 12, seed=99), []
        model = copy.deepcopy(model)
        for precision in PRECISIONS:
            kdq.set_precision_(model, precision)
            model(x)
            found.append(float(kdq.SoftTargets(T=1.0)(model.eval()(x), teacher.eval()(x)).detach()))
        return found

    model, before, after = run()
    assert all(b < 0.5 * a for a, b in zip(before, after, strict=True)), (before, after)
    again = run()[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_a_plan_is_finetuned_by_an_ordinary_distiller() -> None:
    model = switchable()
    kdq.set_precision_(model, MIXED)
    before = copy.deepcopy(model.state_dict())
    distiller = kdq.Distiller(normed_mlp(), model, [kdq.SoftTargets()])
    optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    distiller.fit([randn(32, 12, seed=s) for s in range(3)], 1, optimizer, progress=False)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    active = {"1.weight", "1.bias", "4.1.weight", "4.1.variants.LowBit_4_8.weight_scale", "5.weight"}
    active |= {
        f"{norm}.{part}"
        for norm in ("0.variants.Binary", "3.variants.LowBit_4_8")
        for part in ("weight", "running_mean")
    }
    assert active <= moved
    assert not any("LowBit_2_4" in name for name in moved)
    assert not any(name.startswith(("1.variants", "0.variants.Int8Dynamic", "5.variants")) for name in moved)
    assert kdq.precision_of(model) == MIXED
