"""Studies: the statistics of paired arms, data that are split fairly, and every study from end to end."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from kdq.cli import app
from kdq.studies import layerwise, transfer
from kdq.studies.all import STUDIES
from kdq.studies.paired import Outcome, compare
from kdq.studies.tasks import TASKS
from kdq.studies.training import Batches


def outcomes(arm: str, values: list[float]) -> list[Outcome]:
    return [Outcome("task", "2 bits", arm, seed, {"accuracy": v}) for seed, v in enumerate(values)]


def test_paired_difference() -> None:
    found = compare(
        outcomes("with", [3, 5, 10]) + outcomes("without", [1, 2, 3]), "task", "2 bits", "with", "without", "accuracy"
    )
    assert (found.arm, found.against, found.mean, found.seeds) == (6, 2, 4, 3)
    deviation = math.sqrt(((2 - 4) ** 2 + (3 - 4) ** 2 + (7 - 4) ** 2) / 2)
    assert found.error == pytest.approx(deviation / math.sqrt(3))


@pytest.mark.parametrize(
    ("values", "better", "verdict"),
    [
        ([1.0, 1.1, 0.9], +1, "better"),
        ([1.0, 1.1, 0.9], -1, "worse"),
        ([1.0, -1.1, 0.9], +1, "not shown"),
        ([0.0, 0.0, 0.0], +1, "not shown"),
        ([1.0], +1, "one seed"),
    ],
)
def test_verdict(values: list[float], better: int, verdict: str) -> None:
    arms = outcomes("with", values) + outcomes("without", [0.0] * len(values))
    assert compare(arms, "task", "2 bits", "with", "without", "accuracy").verdict(better) == verdict


def test_unpaired_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same seeds for 'with' and 'without', got \[0, 1\] and \[0\]"):
        compare(outcomes("with", [1, 2]) + outcomes("without", [1]), "task", "2 bits", "with", "without", "accuracy")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_split_depends_on_the_seed_alone(task) -> None:
    data, again, other = task.split(3), task.split(3), task.split(4)
    assert torch.equal(data.train_x, again.train_x)
    assert not torch.equal(data.train_x[:50], other.train_x[:50])
    assert len(data.train_x) == len(data.train_y) > data.labelled == len(data.few()[0])
    assert (
        task.student()(data.test_x).shape
        == task.teacher()(data.test_x).shape
        == (len(data.test_y), 10 if task.name == "digits" else 101)
    )


def test_digits_for_testing_are_not_in_the_training_data() -> None:
    data = TASKS["digits"].split(0)
    assert len(torch.unique(torch.cat([data.train_x, data.test_x]), dim=0)) == len(data.train_x) + len(data.test_x)


def test_arms_of_a_seed_see_the_same_batches() -> None:
    x = torch.arange(10.0)
    with_labels, without = Batches(x, x.long(), 4, 5, seed=1), Batches(x, None, 4, 5, seed=1)
    first, second = [b[0] for b in with_labels], [b[0] for b in without]
    assert len(first) == len(with_labels) == 5
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b[0]) for a, b in zip(first, Batches(x, None, 4, 5, seed=2), strict=True))
    assert len(torch.cat(first[:2]).unique()) == 8  # an epoch repeats nothing


@pytest.mark.parametrize("seed", [0, 1])
def test_halves_share_no_class_and_lose_no_sample(seed: int) -> None:
    data = TASKS["digits"].split(seed)
    first, second = transfer.halves(data, seed)
    seen = [set(), set()]
    for half, classes in zip((first, second), seen, strict=True):
        known = {tuple(x.tolist()): int(y) for x, y in zip(data.train_x, data.train_y, strict=True)}
        number = {int(new): known[tuple(x.tolist())] for x, new in zip(half.train_x, half.train_y, strict=True)}
        assert sorted(number) == list(range(half.classes)) == list(range(5))
        assert all(known[tuple(x.tolist())] == number[int(y)] for x, y in zip(half.train_x, half.train_y, strict=True))
        classes |= set(number.values())
    assert seen[0] | seen[1] == set(range(10))
    assert (seen[0] == set(range(5))) == (seed == 0)
    assert len(first.train_x) + len(second.train_x) == len(data.train_x)
    assert len(first.test_x) + len(second.test_x) == len(data.test_x)


def test_principal_components_leave_the_small_ones() -> None:
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1, 21) + 3
    left = (layerwise.principal_components(x, x) - x).square().sum() / 200
    variances = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    torch.testing.assert_close(left, variances[:-8].sum())


def test_pretraining_trains_every_level_on_the_codes_below() -> None:
    x = TASKS["digits"].split(0).train_x[:200]
    torch.manual_seed(0)
    model = layerwise.autoencoder()
    before = [p.clone() for p in model.parameters()]

    layerwise.pretrain(model, x, 50, 800, seed=0)
    with torch.no_grad():
        codes = [model[:level](x) for level in range(5)]
        errors = [(model[7 - i](codes[i + 1]) - codes[i]).square().mean() / codes[i].var(0).mean() for i in range(4)]
    assert max(errors) < 0.8  # 1 is what the mean code would leave
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", STUDIES)
def test_study_from_the_command_line(name: str, tmp_path) -> None:
    result = CliRunner().invoke(app, ["study", name, "--quick", "--seeds", "1", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / f"{name}.json").read_text())
    arms = {(o["task"], o["group"], o["arm"]) for o in content["outcomes"]}
    assert {task for task, _, _ in arms} == set(STUDIES[name].tasks)
    page = (tmp_path / f"{name}.md").read_text()
    assert all(f"## {comparison.title}" in page for comparison in STUDIES[name].comparisons)
    extra = sum(part is not None for part in (STUDIES[name].section, STUDIES[name].appendix))
    assert page.count("\n## ") >= 1 + len(STUDIES[name].comparisons) + extra
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_unknown_study() -> None:
    result = CliRunner().invoke(app, ["study", "claim-z"])
    assert isinstance(result.exception, ValueError)
    assert "expected one of claim-a" in str(result.exception)
