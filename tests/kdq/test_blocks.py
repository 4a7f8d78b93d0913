"""distill_blocks: each block trains alone, on what those before it give, to put out the teacher's feature."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
from small_models import randn

CONFIGS = [None, kdq.Int8Static(), kdq.LowBit(weight_bits=2, act_bits=4), kdq.Binary()]
DATA = [randn(32, 6, seed=s) for s in range(6)]


def net(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = [6, width, width, 4]
    blocks = [nn.Sequential(nn.BatchNorm1d(a), nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*blocks)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_blocks_train_as_by_hand() -> None:
    """Against a plain loop over what the trained block before puts out, in float64."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    by_hand = copy.deepcopy(student)
    data = [x.double() for x in DATA]
    histories = kdq.distill_blocks(teacher, student, {"1": "1", "3": "3"}, data, 2, lr=1e-2, progress=False)
    for start, end in ((0, 2), (2, 4)):
        optimizer = torch.optim.Adam(by_hand[start:end].parameters(), lr=1e-2)
        losses = []
        for _ in range(2):
            for x in data:
                inputs, feature = by_hand[:start](x).detach(), teacher[:end](x).detach()
                loss = (by_hand[start:end](inputs) - feature).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        found = histories[str(end - 1)]
        assert found.steps == 12
        assert found.losses == pytest.approx([sum(losses[:6]) / 6, sum(losses[6:]) / 6])
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name])
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_nothing_outside_the_block_changes(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = net(16), net(8, seed=1)
    if config is not None:
        kdq.prepare_qat_(student, config)
    states = [state(student)]
    fit = kdq.Distiller.fit

    def observed(self: kdq.Distiller, *args: Any, **options: Any) -> kdq.History:
        history = fit(self, *args, **options)
        states.append(state(student))
        return history

    monkeypatch.setattr(kdq.Distiller, "fit", observed)
    taught = state(teacher)
    histories = kdq.distill_blocks(teacher, student, {"0": "0", "1": "1"}, DATA, 30, lr=1e-2, progress=False)
    assert list(histories) == ["0", "1"]
    assert all(history.losses[-1] < 0.7 * history.losses[0] for history in histories.values())
    for block, (before, after) in enumerate(itertools.pairwise(states)):
        names = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert names == {name for name in after if name.startswith(f"{block}.")}
    assert all(torch.equal(value, taught[name]) for name, value in teacher.state_dict().items())
    student(DATA[0])
    if config is not None:
        kdq.convert_(student)


def test_activation_scales_start_from_what_a_block_trains_on() -> None:
    """From batch norms in training mode, behind blocks in eval mode."""
    teacher, student = net(8), net(8, seed=1)
    kdq.prepare_qat_(student, kdq.LowBit(weight_bits=4, act_bits=4))
    expected = copy.deepcopy(student)
    kdq.distill_blocks(teacher, student, {"0": "0", "1": "1"}, DATA[:1], 1, lr=1e-30, progress=False)
    expected[0](DATA[0])
    expected[1](expected[0].eval()(DATA[0]))
    for block in (0, 1):
        torch.testing.assert_close(student[block][1].input_grid.scale, expected[block][1].input_grid.scale)


def test_frozen_parameters_do_not_train() -> None:
    teacher, student = net(8), net(8, seed=1)
    kdq.freeze_(student[0])
    with pytest.raises(ValueError, match="nothing to train in the block of student layer '0', from the input on"):
        kdq.distill_blocks(teacher, student, {"0": "0", "1": "1"}, DATA, 1)
    before = state(student)
    kdq.distill_blocks(teacher, student, {"1": "1"}, DATA, 1, progress=False)
    assert {n.split(".")[0] for n, v in student.state_dict().items() if not torch.equal(v, before[n])} == {"1"}
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == [
        name for name in before if name.startswith("0.") and "running" not in name and "num" not in name
    ]


def test_scheduler_and_modes() -> None:
    teacher, student = net(8).eval(), net(8, seed=1)
    student[1].eval()
    rates: list[float] = []

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        def rate(step: int) -> float:
            rates.append(step)
            return 1.0

        return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    kdq.distill_blocks(teacher, student, {"0": "0", "1": "1"}, DATA, 1, scheduler=schedule, progress=False)
    assert rates == [0, 1, 2, 3, 4, 5, 6] * 2
    assert [block.training for block in student] == [True, False, True]


@pytest.mark.parametrize(
    ("pairs", "data", "epochs", "message"),
    [
        ({"1": "1", "0": "0"}, DATA, 1, "pairs: expected student layers in the order in which they run, '0', '1'"),
        ({"0": "0", "0.2": "1"}, DATA, 1, "order in which they run, '0.2', '0'"),
        ({"0.1": "0", "0": "0"}, DATA, 1, "nothing to train in the block of student layer '0', behind '0.1'"),
        ({"0": "0", "5": "1"}, DATA, 1, "student has no layer '5'"),
        ({"0": "0", "1": "5"}, DATA, 1, "teacher has no layer '5'"),
        ({}, DATA, 1, "pairs"),
        (["0"], DATA, 1, "pairs"),
        ({"0": "0"}, [], 1, "loader: expected at least one batch"),
        ({"0": "0"}, iter(DATA), 1, "loader: every block needs all batches"),
        ({"0": "0"}, DATA, 0, "epochs"),
    ],
)
def test_errors_train_nothing(pairs: Any, data: Any, epochs: int, message: str) -> None:
    teacher, student = net(8), net(8, seed=1)
    before = state(student)
    with pytest.raises(ValueError, match=message):
        kdq.distill_blocks(teacher, student, pairs, data, epochs, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not any(module._forward_hooks for model in (teacher, student) for module in model.modules())


def test_features_that_cannot_be_compared() -> None:
    teacher = nn.Sequential(net(8), nn.Unflatten(1, (2, 2)))
    with pytest.raises(ValueError, match="expected features that differ only in"):
        kdq.distill_blocks(teacher, net(8, seed=1), {"0": "0.0", "2": "1"}, DATA, 1)
