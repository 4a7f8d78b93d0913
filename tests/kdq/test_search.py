"""search_precision: costs against what is saved, sensitivities against a formula, the choice against brute force."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kdq
from kdq.configs import Config
from kdq.observe import parse_batch
from kdq.search.cost import input_rows, layer_bytes, tensor_bytes
from kdq.search.precision import BuiltLayers
from kdq.search.solve import Limit, chosen_sum, solve

TWO, FOUR = kdq.LowBit(weight_bits=2, act_bits=8), kdq.LowBit(weight_bits=4, act_bits=8)
ALL = [None, kdq.Int8Dynamic(), kdq.Int8Static(), kdq.Int8WeightOnly(), FOUR, TWO, kdq.Binary()]


@pytest.fixture(autouse=True, scope="module")
def _short_rounds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdq.search.cost.ROUND_SECONDS", 1e-4)
        yield


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 16, bias=False), nn.ReLU()]
    return nn.Sequential(nn.BatchNorm1d(12), *hidden, nn.Linear(16, 5))


def loader(batches: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(20, 12, generator=generator), torch.arange(20) % 5) for _ in range(batches)]


def search(student: nn.Module, teacher: nn.Module | None, data: Any, budget: kdq.Budget, **options: Any) -> kdq.Plan:
    return kdq.search_precision(student, teacher, data, budget=budget, rounds=1, progress=False, **options)


def kl(student: nn.Module, teacher: nn.Module) -> float:
    """In plain float64, over all rows."""
    x = torch.cat([x for x, _ in loader()])
    with torch.no_grad():
        p, q = (m.eval()(x).double().softmax(-1) for m in (teacher, student))
    return float((p * (p / q).log()).sum(-1).mean())


def cross_entropy(student: nn.Module) -> float:
    x, y = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    with torch.no_grad():
        q = student.eval()(x).double().softmax(-1)
    return float(-q[torch.arange(len(y)), y].log().mean())


@pytest.mark.parametrize("sensitivity", ["teacher_kl", "label_loss"])
def test_sensitivities_are_those_of_quantize(sensitivity: str) -> None:
    student, teacher = model(0), model(1)
    student[0].eval()  # modes are mixed: they must come back so
    before = copy.deepcopy(student)
    plan = search(student, teacher, loader(), kdq.Budget(average_bits=3), candidates=ALL, sensitivity=sensitivity)

    def distance(m: nn.Module) -> float:
        return kl(m, teacher) if sensitivity == "teacher_kl" else cross_entropy(m)

    assert [m.training for m in student.modules()] == [m.training for m in before.modules()]
    assert all(type(student[i]) is nn.Linear for i in (1, 3, 5, 7))
    assert plan.base_distance == pytest.approx(distance(copy.deepcopy(before)), rel=1e-6)
    for layer in plan.layers:
        for option in layer.options:
            one = copy.deepcopy(before)
            if option.config is not None:
                kdq.quantize_(one, {layer.names[0]: option.config}, calibration=loader())
            assert option.sensitivity == pytest.approx(distance(one) - plan.base_distance, rel=1e-6, abs=1e-9)
    whole = copy.deepcopy(before)
    kdq.quantize_(whole, plan, calibration=loader())
    assert plan.measured_distance == pytest.approx(distance(whole), rel=1e-6)


def test_weight_sqnr_is_the_relative_noise_and_needs_no_teacher() -> None:
    student = model()
    plan = search(
        student, None, loader(), kdq.Budget(average_bits=4), candidates=[FOUR, kdq.Binary()], sensitivity="weight_sqnr"
    )
    weight = student[1].weight.detach().double()
    rounded = weight.sign() * weight.abs().mean(1, keepdim=True)
    expected = float((rounded - weight).square().sum() / weight.square().sum())
    assert plan.layers[0].options[1].sensitivity == pytest.approx(expected, rel=1e-5)
    assert set(plan.values()) == {FOUR}


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize("bias", [True, False])
def test_bytes_are_those_of_the_state_dict(config: Config | None, bias: bool) -> None:
    built = BuiltLayers(nn.Sequential(nn.Linear(67, 9, bias=bias)), [torch.randn(3, 67)])
    with built.at("0", config):
        assert layer_bytes(built.layers["0"], config) == tensor_bytes(built.model)


class Tied(nn.Module):
    """One linear layer under two names, called three times, beside another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a
        self.c = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.b(self.a(self.norm(self.a(x)))))
        return y


def test_shared_layers_get_one_precision_and_all_their_calls_count() -> None:
    student = Tied()
    data = [torch.randn(4, 5, 6)]
    plan = search(student, copy.deepcopy(student), data, kdq.Budget(average_bits=5), candidates=[None, FOUR, TWO])
    assert [(layer.names, layer.calls, layer.rows) for layer in plan.layers] == [(("a", "b"), 3, 60), (("c",), 1, 20)]
    assert plan["a"] == plan["b"]
    kdq.quantize_(student, plan, calibration=data)
    assert student.a is student.b
    assert plan.size_bytes == tensor_bytes(student)


def test_transformer_layers_are_measured_as_quantize_leaves_them() -> None:
    torch.manual_seed(0)
    student = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    data = [torch.randn(2, 3, 16)]
    plan = search(student, copy.deepcopy(student), data, kdq.Budget(average_bits=4))
    assert [layer.rows for layer in plan.layers] == [6] * 4
    assert all(layer.activation_relu_or_gelu == 1 for layer in student.layers)
    assert all(option.latency_ms > 0 for layer in plan.layers for option in layer.options)
    with torch.no_grad():
        taught = copy.deepcopy(student).eval()(data[0]).double().log_softmax(-1)
        kdq.quantize_(student.eval(), plan, calibration=data)
        learned = student(data[0]).double().log_softmax(-1)
    expected = float((taught.exp() * (taught - learned)).sum(-1).mean())
    assert plan.measured_distance == pytest.approx(expected, rel=1e-4)


def test_refining_measures_around_the_plan_and_keeps_the_best() -> None:
    student, teacher, budget = model(0), model(0), kdq.Budget(average_bits=2)
    plain = search(student, teacher, loader(), budget)
    refined = search(student, teacher, loader(), budget, refine=3)
    again = search(student, teacher, loader(), budget, refine=3)
    assert dict(refined) == dict(again)
    assert refined.measured_distance == again.measured_distance
    assert plain.measured_distance is not None
    assert refined.measured_distance is not None
    assert refined.measured_distance <= plain.measured_distance
    assert refined.average_bits <= 2


@pytest.mark.parametrize("bits", [1.5, 2, 3.2, 8])
@pytest.mark.parametrize("switchable", [False, True])
def test_refining_is_never_worse_than_the_best_uniform_plan(bits: float, switchable: bool) -> None:
    student, teacher = (switchable_student() if switchable else model(0)), model(1)
    plan = search(student, teacher, loader(), kdq.Budget(average_bits=bits), candidates=OWN, refine=1)
    for config in OWN:
        uniform = plan.replace({name: config for layer in plan.layers for name in layer.names})
        if uniform.average_bits > bits:
            continue
        if switchable:
            converted = kdq.extract(student, uniform)
        else:
            converted = copy.deepcopy(student)
            kdq.quantize_(converted, uniform, calibration=loader())
        assert plan.measured_distance is not None
        assert plan.measured_distance <= kl(converted, teacher) + 1e-6


# ---- switchable students ---------------------------------------------------------------------------------------------

OWN = [kdq.Int8Dynamic(), TWO, kdq.Binary()]


def switchable_student(tied: bool = False) -> nn.Module:
    student: nn.Module = Tied() if tied else model(0)
    kdq.prepare_switchable_(student, OWN)
    data = [torch.randn(4, 5, 6)] if tied else loader()
    kdq.SwitchableDistiller(Tied() if tied else model(1), student, [kdq.SoftTargets()]).fit(
        data, 2, lr=0.01, progress=False
    )
    return student


@pytest.mark.parametrize("tied", [False, True])
def test_a_switchable_student_is_searched_at_its_own_precisions(tied: bool) -> None:
    student, teacher = switchable_student(tied), (Tied() if tied else model(1))
    data: Any = [torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(3))] if tied else loader()
    kdq.set_precision_(student, {"*": TWO})
    student.train()
    before = copy.deepcopy(student)
    plan = search(student, teacher, data, kdq.Budget(average_bits=3))
    assert str(student) == str(before)
    assert all(module.training for module in student.modules())
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), student.state_dict().values(), strict=True)
    )
    assert all([option.config for option in layer.options] == OWN for layer in plan.layers)
    assert 1 <= plan.average_bits <= 3
    kdq.set_precision_(student, plan)
    assert kdq.precision_of(student) == {name: plan[name] for name in kdq.precision_of(student)}
    converted = kdq.extract(student, plan)
    assert plan.size_bytes == tensor_bytes(converted)
    with torch.no_grad():
        x = torch.cat([batch if tied else batch[0] for batch in data])
        taught, learned = (m.eval()(x).double().log_softmax(-1) for m in (teacher, converted))
    expected = float((taught.exp() * (taught - learned)).sum(-1).mean())
    assert plan.measured_distance == pytest.approx(expected, rel=1e-4)


def test_layers_that_are_not_switchable_are_left_to_the_rest() -> None:
    student = model(0)
    kdq.prepare_switchable_(student, OWN, lambda _, name: name != "7")
    kdq.SwitchableDistiller(model(1), student, [kdq.SoftTargets()]).fit(loader(), 1, progress=False)
    plan = search(student, model(1), loader(), kdq.Budget(average_bits=3))
    assert [layer.names for layer in plan.layers] == [("1",), ("3",), ("5",)]
    assert plan.size_bytes == tensor_bytes(kdq.extract(student, plan))


@pytest.mark.parametrize("sensitivity", ["teacher_kl", "weight_sqnr"])
def test_a_switchable_student_has_no_float_form(sensitivity: str) -> None:
    with pytest.raises(ValueError, match="candidates: a switchable student has no float form"):
        search(switchable_student(), model(), loader(), BITS, candidates=[None, TWO], sensitivity=sensitivity)


class Recording:
    """A `Precision` of somebody else's: what the search asks of it, forwarded to the built layers."""

    def __init__(self, built: BuiltLayers) -> None:
        self.built, self.layers, self.base, self.depth = built, built.layers, built.base, 0
        self.asked: set[tuple[str, Config | None]] = set()

    @contextmanager
    def at(self, name: str, config: Config | None) -> Iterator[None]:
        self.asked.add((name, config))
        self.depth += 1
        with self.built.at(name, config):
            yield
        self.depth -= 1


def test_a_students_own_precision_is_used() -> None:
    student, teacher = model(0), model(1)
    own = Recording(BuiltLayers(student.eval(), [x for x, _ in loader()]))
    budget = kdq.Budget(size_bytes=2000)
    plan = search(student, teacher, loader(), budget, precision=own)
    assert dict(plan) == dict(search(student, teacher, loader(), budget))
    assert own.depth == 0
    assert {("1", TWO), ("7", kdq.Binary())} <= own.asked


def test_input_rows_are_of_every_call() -> None:
    tied = Tied()
    assert input_rows(tied, ["a", "c"], parse_batch(torch.zeros(2, 6), tied)) == {"a": [2, 2, 2], "c": [2]}


# ---- the choice ------------------------------------------------------------------------------------------------------


def brute_force(sensitivity: Sequence[Sequence[float]], limits: Sequence[Limit]) -> float | None:
    choices = itertools.product(*(range(len(row)) for row in sensitivity))
    sums = [chosen_sum(sensitivity, c) for c in choices if all(m.total(c) <= m.bound for m in limits)]
    return min(sums, default=None)


integers = st.integers(0, 60)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1.0, 1e-6]))
def test_the_choice_is_as_good_as_brute_force(data: st.DataObject, layers: int, options: int, unit: float) -> None:
    def table(values: st.SearchStrategy[int]) -> list[list[int]]:
        return data.draw(
            st.lists(st.lists(values, min_size=options, max_size=options), min_size=layers, max_size=layers)
        )

    sensitivity = [[unit * v for v in row] for row in table(st.integers(-20, 60))]
    sizes = table(integers)
    limits = [Limit("size_bytes", sizes, data.draw(st.integers(0, 60 * layers)), 0)]
    limits.append(Limit("latency_ms", table(integers), data.draw(st.integers(0, 60 * layers)), 3))
    best = brute_force(sensitivity, limits)
    if best is None:
        with pytest.raises(ValueError, match="budget: "):
            solve(sensitivity, sizes, limits)
        return
    choice = solve(sensitivity, sizes, limits)
    assert all(limit.total(choice) <= limit.bound for limit in limits)
    assert chosen_sum(sensitivity, choice) == pytest.approx(best, abs=1e-6 * unit)
    ties = [
        chosen_sum(sizes, c)
        for c in itertools.product(range(options), repeat=layers)
        if all(m.total(c) <= m.bound for m in limits)
        and math.isclose(chosen_sum(sensitivity, c), best, abs_tol=unit / 2)
    ]
    assert chosen_sum(sizes, choice) == min(ties)


def test_large_sizes_keep_to_the_byte() -> None:
    sizes = [[10**9 + 1, 10**8], [10**9, 10**8]]
    sensitivity = [[0.0, 1.0], [0.0, 2.0]]
    assert solve(sensitivity, sizes, [Limit("size_bytes", sizes, 2 * 10**9 + 1)]) == [0, 0]
    assert solve(sensitivity, sizes, [Limit("size_bytes", sizes, 2 * 10**9)]) == [1, 0]


def test_the_smallest_reachable_value_is_named() -> None:
    with pytest.raises(ValueError, match="average_bits=0.5 cannot be met, the smallest is 1.00"):
        search(model(), model(), loader(), kdq.Budget(average_bits=0.5))
    costs = [[1.0, 9.0]]
    with pytest.raises(ValueError, match="latency_ms=2 cannot be met together with size_bytes=5, the smallest is 9"):
        solve([[0, 0]], [[9, 1]], [Limit("latency_ms", costs, 2), Limit("size_bytes", [[9, 1]], 5)])


# ---- errors ----------------------------------------------------------------------------------------------------------


class NaN(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * math.nan


BITS = kdq.Budget(average_bits=3)
INPUTS = [x for x, _ in loader()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "loader: expected at least one batch"),
        ({"teacher": nn.Linear(12, 4)}, r"one shape .*\[20, 5\] and \[20, 4\]"),
        ({"teacher": None}, "teacher: .*needs one"),
        ({"data": INPUTS, "sensitivity": "label_loss"}, "needs labels"),
        ({"student": nn.Sequential(nn.ReLU()), "teacher": nn.ReLU()}, "no linear layer that quantize_ would replace"),
        ({"student": nn.Sequential(model(), NaN())}, "the student as it is is nan"),
        ({"sensitivity": "hessian"}, "sensitivity: expected one of"),
        ({"candidates": []}, "candidates: expected at least one"),
        ({"refine": 1, "sensitivity": "weight_sqnr"}, "nothing to refine"),
        ({"refine": -1}, "refine, rounds"),
        ({"data": [(loader()[0][0], torch.full((20,), -100))]}, "no row counts"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"student": model(), "teacher": model(), "data": loader(), "budget": BITS, **change}
    with pytest.raises(ValueError, match=message):
        search(**arguments)


def test_an_unknown_candidate_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="config: expected one of"):
        search(model(), model(), loader(), BITS, candidates=[8])


def test_a_failure_on_the_way_leaves_the_student_as_it_was() -> None:
    student = model().train()
    student.register_forward_hook(lambda _m, _x, y: y * math.nan if type(student[5]) is not nn.Linear else y)
    with pytest.raises(ValueError, match="'5' at LowBit.* is nan"):
        search(student, model(), loader(), BITS, candidates=[TWO])
    assert all(type(student[i]) is nn.Linear for i in (1, 3, 5, 7))
    assert all(m.training for m in student.modules())


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from kdq.cli import app

    kdq.save(model(0).eval(), tmp_path / "s.safetensors")
    kdq.save(model(1).eval(), tmp_path / "t.safetensors")
    (tmp_path / "search_batches.py").write_text("import torch\ndef batches():\n    return [torch.ones(4, 12)]\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["search", "s.safetensors", "t.safetensors", "--data", "search_batches:batches"]
    result = CliRunner().invoke(app, [*arguments, "--average-bits", "3", "--json", "plan.json"], catch_exceptions=False)
    assert result.exit_code == 0
    assert kdq.Plan.load("plan.json").average_bits <= 3
    with pytest.raises(ValueError, match="budget: expected at least one"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
