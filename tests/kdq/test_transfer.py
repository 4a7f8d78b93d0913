"""transfer_: what is copied computes the same, frozen parts stay as they are, and an error changes nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq.configs import Config
from kdq.quantize import training_twin
from small_models import randn

FOUR, TWO = kdq.LowBit(weight_bits=4, act_bits=4), kdq.LowBit(weight_bits=2, act_bits=3)
CONFIGS = [kdq.Int8Static(), FOUR, kdq.LowBit(weight_bits=3, act_bits=4, method="pact"), kdq.Binary()]


def net(classes: int = 4, seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.BatchNorm1d(6), nn.Linear(6, width), nn.Tanh(), nn.BatchNorm1d(width), nn.Linear(width, width)]
    model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(width, classes))
    with torch.no_grad():
        model(randn(50, 6, seed=seed) * (1 + seed) + seed)  # norms of two seeds have measured different things
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_first_layers_compute_what_the_teachers_do() -> None:
    teacher, student = net(), net(classes=3, seed=1)
    parameters, before, taught = list(student.parameters()), state(student), state(teacher)
    report = kdq.transfer_(teacher, student, 2)
    assert report.changed == {name: f"from '{name}'" for name in ("0", "1", "3", "4")}
    assert report.left == {"6": "behind the first 2 layers"}
    assert {name.split(".")[0] for name in changed(student, before)} == {"0", "1", "3", "4"}
    assert torch.equal(student.eval()[:6](randn(9, 6)), teacher.eval()[:6](randn(9, 6)))
    assert all(a is b for a, b in zip(parameters, student.parameters(), strict=True)), "an optimizer still holds them"
    assert not changed(teacher, taught)
    with torch.no_grad():
        student[1].weight.zero_()
    assert not changed(teacher, taught)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_twin_from_float_is_that_of_the_teachers_layer(config: Config) -> None:
    teacher, student = net(), net(seed=1)
    kdq.prepare_qat_(student, config)
    student(randn(20, 6, seed=3))  # activation scales are those of other features
    report = kdq.transfer_(teacher, student, {"1": "1"})
    assert report.changed == {"1": "from '1', scales fitted anew"}
    x = randn(20, 6, seed=4)
    expected = training_twin(copy.deepcopy(teacher[1]), config)
    assert torch.equal(student[1](x), expected(x))
    assert not changed(student[1], state(expected))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_twin_from_twin_takes_the_learned_scales(config: Config) -> None:
    teacher, student = net(), net(seed=1)
    for model in (teacher, student):
        kdq.prepare_qat_(model, config)
        model(randn(20, 6, seed=3))
    with torch.no_grad():
        for parameter in teacher[1].parameters():
            parameter.mul_(1.1)
    assert kdq.transfer_(teacher, student, 1).changed["1"] == "from '1' with its scales"
    assert torch.equal(student[:2].eval()(randn(9, 6)), teacher[:2].eval()(randn(9, 6)))


def test_between_precisions_and_back_to_float() -> None:
    teacher, student = net(), net(seed=1)
    kdq.prepare_qat_(teacher, FOUR)
    kdq.transfer_(teacher, student, {"": ""})
    assert torch.equal(student[1].weight, teacher[1].weight)
    kdq.prepare_switchable_(student, [FOUR, TWO])
    report = kdq.transfer_(net(seed=2), student, 2)
    assert report.changed["3"] == "from '3' for every precision"
    for precision in (TWO, FOUR):
        kdq.set_precision_(student, precision)
        expected = training_twin(copy.deepcopy(net(seed=2)[4]), precision)
        assert torch.equal(student[4](randn(9, 8)), expected(randn(9, 8)))
        assert torch.equal(student[3].eval()(randn(9, 8)), net(seed=2)[3].eval()(randn(9, 8)))
    twin = copy.deepcopy(student)
    assert kdq.transfer_(twin, student, 2).changed["4"] == "from '4' with its scales"


@pytest.mark.parametrize("config", [None, FOUR, kdq.Binary()], ids=str)
def test_frozen_layers_stay_as_they_are(config: Config | None) -> None:
    teacher, student = net(), net(classes=3, seed=1)
    if config is not None:
        kdq.prepare_qat_(student, config)
    kdq.transfer_(teacher, student, 1, freeze=True)
    x, target = randn(32, 6, seed=5), torch.arange(32) % 3
    student(x)  # activation scales start
    before, copied = state(student), pickle.loads(pickle.dumps(copy.deepcopy(student)))
    for model in (student, copied):
        kdq.Distiller(model, model, [kdq.CrossEntropy()]).fit([(x, target)], 3, lr=1e-2, progress=False)
        assert {name.split(".")[0] for name in changed(model, before)} == {"3", "4", "6"}
        assert model[3].num_batches_tracked == before["3.num_batches_tracked"] + 3
    kdq.unfreeze_(student)
    before = state(student)
    kdq.Distiller(student, student, [kdq.CrossEntropy()]).fit([(x, target)], 3, lr=1e-2, progress=False)
    assert {name.split(".")[0] for name in changed(student, before)} == {"0", "1", "3", "4", "6"}
    assert student[0].num_batches_tracked == before["0.num_batches_tracked"] + 3
    kdq.convert_(student)


def test_blocks_leave_what_does_not_fit() -> None:
    teacher, student = nn.ModuleDict({"body": net()}), nn.ModuleDict({"block": net(classes=3, seed=1)})
    student["block"].append(nn.LayerNorm(3))
    report = kdq.transfer_(teacher, student, {"block": "body"})
    assert report.changed.keys() == {f"block.{i}" for i in (0, 1, 3, 4)}
    assert report.left == {
        "block.6": "weight is [3, 8] in the student and [4, 8] in the teacher",
        "block.7": "the teacher has no weights at 'body.7'",
    }


def test_modules_with_weights_beside_their_children() -> None:
    teacher, student = nn.Sequential(nn.MultiheadAttention(8, 2)), nn.Sequential(nn.MultiheadAttention(8, 2))
    report = kdq.transfer_(teacher, student, {"0": "0"}, freeze=True)
    assert report.changed.keys() == {"0", "0.out_proj"}
    assert not changed(student, state(teacher))
    assert not any(p.requires_grad for p in student.parameters())


def tied(seed: int) -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    return model


def broken(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    return model


def converted(model: nn.Sequential) -> nn.Sequential:
    kdq.quantize_(model, kdq.Int8Dynamic())
    return model


@pytest.mark.parametrize(
    ("teacher", "student", "layers", "error", "message"),
    [
        (net(), net(3), {"1": "1", "6": "6"}, ValueError, r"'6' from '6': weight is \[3, 8\] in the student and"),
        (net(), net(width=5), 1, ValueError, "'1' from '1': weight"),
        (net(), net(), {"1": "1", "4": "0"}, ValueError, "'4' from '0': it is Linear in the student and BatchNorm1d"),
        (net(), net(), {"1": "9"}, ValueError, "teacher has no layer '9'"),
        (net(), net(), {"9": "1"}, ValueError, "student has no layer '9'"),
        (net(), net(), {"2": "2"}, ValueError, "nothing to transfer: it holds no weights"),
        (net(), net(), {"1": "1", "": ""}, ValueError, "'1' would get two"),
        (net(), net(), {}, ValueError, "empty"),
        (net(), net(), 0, ValueError, "layers: expected a number from 1 to 3"),
        (net(), net(), 4, ValueError, "layers: expected a number from 1 to 3, as the student has layers, got 4"),
        (net(), net()[1:], 1, ValueError, "'1' in the student and '0', '1' in the teacher: name the pairs"),
        (net(), net(), "1", TypeError, "layers"),
        (net(), net(), True, TypeError, "layers"),
        (broken(net()), net(), 2, ValueError, "'4' from '4': the teacher's weight contains NaN"),
        (net(), converted(net()), 1, ValueError, "the student's Int8Linear is on kernels already"),
        (converted(net()), net(), 1, ValueError, "the teacher's Int8Linear is on kernels already"),
        (tied(0), tied(1), 1, ValueError, "'1' is left, but shares a tensor with '0'"),
        (
            nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)),
            tied(1),
            2,
            ValueError,
            "'1' and '0' share a tensor and would get two",
        ),
    ],
)
def test_errors_change_nothing(teacher: Any, student: Any, layers: Any, error: type[Exception], message: str) -> None:
    before = state(student)
    with pytest.raises(error, match=message):
        kdq.transfer_(teacher, student, layers, freeze=True)
    assert not changed(student, before)
    assert all(p.requires_grad for p in student.parameters())
