"""compress: the whole road in one call, interrupted and taken up again."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdq
from compress_runs import BUDGET, SETTINGS, Interrupted, compressed, data, loader, model, same
from kdq.checkpoint import write_atomically
from kdq.compression import road
from kdq.compression.folder import RunFolder
from kdq.compression.report import CompressionReport, Model, pareto_front, times
from kdq.reporting import layer_errors
from kdq.search.cost import Timing, tensor_bytes
from kdq.validation import validate


@pytest.fixture(autouse=True, scope="module")
def _short_rounds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("kdq.search.cost", "kdq.reporting"):
            patch.setattr(f"{module}.ROUND_SECONDS", 1e-5)
        yield


@pytest.fixture(autouse=True)
def _no_pages(request, monkeypatch) -> None:
    """Drawing takes most of a small run's time; one test does it."""
    if request.node.name != "test_the_road":
        monkeypatch.setattr(road.CompressionReport, "save_html", lambda self, path: path.write_text(""))


def test_the_road(tmp_path) -> None:
    original = model()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    result = kdq.compress(original, loader(), budget=BUDGET, folder=tmp_path, **SETTINGS)
    assert all(torch.equal(before[name], tensor) for name, tensor in original.state_dict().items())
    assert result.plan.average_bits <= 4.0
    assert {name: layer.config for name, layer in result.model.named_modules() if hasattr(layer, "config")} == dict(
        result.plan
    )
    x, _ = data()
    again = kdq.load(tmp_path / "model.safetensors", model()).eval()
    assert torch.equal(again(x), result.model(x))
    report = result.report
    assert report.after.size_bytes < report.before.size_bytes
    assert report.before.teacher_kl == 0
    assert report.samples == 64
    assert report.after.size_bytes == result.plan.size_bytes == tensor_bytes(result.model)
    assert report.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert [t.phase for t in report.training] == ["distil", "finetune"]
    assert all(len(t.losses) == 2 for t in report.training)
    assert [layer.name for layer in report.layers] == ["0", "4"]
    assert CompressionReport.from_json(json.loads((tmp_path / "report.json").read_text())) == report
    assert kdq.Plan.load(tmp_path / "plan.json") == result.plan
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "Int8Dynamic" in page
    assert "compressed" in str(report)
    for text in (str(report), page):
        assert "tensor bytes" in text
        assert f"{report.after.size_bytes:,} bytes of tensors; file with header: {report.file_bytes:,}" in text


def test_the_error_of_a_layer_is_told_before_and_after(tmp_path) -> None:
    """Before: as quantize_ leaves the model that was given. After: as compressed. Both beside the float model."""
    result = compressed(
        tmp_path, candidates=[kdq.LowBit(weight_bits=3, act_bits=8), kdq.LowBit(weight_bits=2, act_bits=8)]
    )
    rounded = model()
    kdq.quantize_(rounded, result.plan, calibration=[data()])
    errors = {error.name: error.sqnr_db for error in layer_errors(rounded, model(), data())}
    assert {layer.name: layer.rounded_sqnr_db for layer in result.report.layers} == pytest.approx(errors, rel=1e-6)
    after = {error.name: error.sqnr_db for error in layer_errors(result.model, model(), data())}
    assert {layer.name: layer.sqnr_db for layer in result.report.layers} == pytest.approx(after, rel=1e-6)
    assert all(layer.own_sqnr_db is not None and layer.own_sqnr_db > 0 for layer in result.report.layers)
    found = validate(rounded, model(), [data()])
    assert (result.report.rounded.accuracy, result.report.rounded.teacher_kl) == (found.accuracy, found.teacher_kl)
    text = str(result.report)
    assert str(result) == text
    for value in errors.values():
        assert f"{value:.1f}" in text
    assert "only rounded" in text


@pytest.mark.parametrize("method", ["pact", "dorefa"])
def test_methods_of_training_are_rounded_as_lsq(method: str, tmp_path) -> None:
    candidates = [kdq.LowBit(weight_bits=bits, act_bits=8, method=method) for bits in (4, 2)]
    result = compressed(tmp_path, candidates=candidates)
    assert set(result.plan.values()) <= set(candidates)
    rounded = model()
    untrained = {name: replace(config, method="lsq") for name, config in result.plan.items()}
    kdq.quantize_(rounded, untrained, calibration=[data()])
    assert result.report.rounded.teacher_kl == validate(rounded, model(), [data()]).teacher_kl
    same(compressed(tmp_path, Interrupted(0), candidates=candidates).model, result.model)


@pytest.mark.parametrize("batches", [0, 5, 9, 12, 15])  # epochs have 4: two of distillation, two of the finetune
def test_a_killed_run_goes_on_to_the_same_result(batches: int, tmp_path) -> None:
    whole = compressed(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compressed(tmp_path / "killed", Interrupted(batches))
    resumed = compressed(tmp_path / "killed")
    assert dict(resumed.plan) == dict(whole.plan)
    assert resumed.plan.measured_distance == whole.plan.measured_distance
    same(resumed.model, whole.model)
    assert [t.losses for t in resumed.report.training] == [t.losses for t in whole.report.training]


@pytest.mark.parametrize("step", ["search_precision", "save", "evaluate"])
def test_killed_between_the_trainings(step: str, tmp_path, monkeypatch) -> None:
    whole = compressed(tmp_path / "whole")
    calls = []
    original = getattr(road, step)

    def killed(*args, **kwargs):
        calls.append(step)
        if len(calls) == (2 if step == "search_precision" else 1):  # the first search only checks the budget
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(road, step, killed)
        with pytest.raises(KeyboardInterrupt):
            compressed(tmp_path / "killed")
    same(compressed(tmp_path / "killed", Interrupted(0 if step != "search_precision" else 8)).model, whole.model)


def test_a_search_that_is_taken_up_stands_on_the_times_of_before(tmp_path, monkeypatch) -> None:
    """Times that grow from one measurement to the next: a plan that is made of later ones would be another."""
    measured = []

    def measure(model, precision, names, candidates, batch, rounds) -> Timing:
        measured.append(len(measured))
        first = {name: 1.0 + len(measured) for name in names}
        return Timing({c: {name: ms / (i + 1) for name, ms in first.items()} for i, c in enumerate(candidates)}, 0.25)

    def killed(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kdq.search.run.measure", measure)
    budget = kdq.Budget(latency_ms=5.0)
    with monkeypatch.context() as patch:
        patch.setattr("kdq.search.run._Search.by_distance", killed)  # the times are there, the plan is not
        with pytest.raises(KeyboardInterrupt):
            compressed(tmp_path, budget=budget)
    shutil.copytree(tmp_path, tmp_path / "moved")
    resumed = compressed(tmp_path, Interrupted(8), budget=budget)
    assert measured == [0, 1], "once before the training, for the budget, and once in the search"
    assert resumed.plan.fixed_ms == 0.25
    assert [[o.latency_ms for o in layer.options] for layer in resumed.plan.layers] == [[3.0, 1.5]] * 2
    again = compressed(tmp_path, Interrupted(8), budget=kdq.Budget(latency_ms=7.0))
    assert measured == [0, 1, 2], "another search measures for itself"
    assert again.plan.layers[0].options[0].latency_ms == 4.0
    assert len(list(tmp_path.glob("search-*.json"))) == 1
    measured.clear()
    monkeypatch.setattr("kdq_kernels.cpu_isa", lambda: "another")
    with pytest.warns(UserWarning, match="measured anew; times: .* is of cpu_isa .*, expected another"):
        moved = compressed(tmp_path / "moved", Interrupted(8), budget=budget)
    assert measured == [0]
    assert moved.plan.layers[0].options[0].latency_ms == 2.0


def test_finished_phases_are_not_repeated(tmp_path) -> None:
    whole = compressed(tmp_path)
    same(compressed(tmp_path, Interrupted(0)).model, whole.model)
    smaller = compressed(tmp_path, Interrupted(8), budget=kdq.Budget(average_bits=2.5))  # only the finetune's batches
    assert smaller.plan.average_bits <= 2.5
    with pytest.raises(KeyboardInterrupt):
        compressed(tmp_path, Interrupted(0), seed=1)


@pytest.mark.parametrize(("narrow", "recursive"), [((2, 8), False), ((1, 8), True), ((1, 1), True)])
def test_recursive_only_with_one_bit(narrow: tuple[int, int], recursive: bool, tmp_path, monkeypatch) -> None:
    made = []

    class Noted(kdq.SwitchableDistiller):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            made.append(self.recursive)

    monkeypatch.setattr(road, "SwitchableDistiller", Noted)
    weight_bits, act_bits = narrow
    compressed(
        tmp_path,
        candidates=[kdq.Int8Dynamic(), kdq.LowBit(weight_bits=weight_bits, act_bits=act_bits)],
        budget=kdq.Budget(average_bits=8),
    )
    assert made == [recursive]


def test_a_teacher_that_is_worse_is_named(tmp_path) -> None:
    student = model()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    x, y = data()
    for _ in range(60):
        nn.functional.cross_entropy(student(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(UserWarning, match="the teacher is worse than the student") as caught:
        kdq.compress(student, loader(), budget=BUDGET, teacher=model(3), folder=tmp_path, **SETTINGS)
    assert [w.filename for w in caught if "worse than the student" in str(w.message)] == [__file__]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["teacher"]["accuracy"] < report["before"]["accuracy"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path) -> None:
    def half(path: Path) -> None:
        path.write_text("ha")
        raise KeyboardInterrupt

    file = tmp_path / "file"
    write_atomically(file, lambda path: path.write_text("before"))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, half)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_killed_while_it_wrote_its_first_record(tmp_path) -> None:
    (tmp_path / "run.json.partial").write_text("{")
    assert RunFolder(tmp_path).record == {}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_pareto_front() -> None:
    small, fast, beaten, good = (
        Model("small", 0.8, 0.1, 10, 3.0),
        Model("fast", 0.8, 0.1, 20, 1.0),
        Model("beaten", 0.7, 0.1, 20, 3.0),
        Model("good", 0.9, 0.1, 40, 4.0),
    )
    assert pareto_front([small, fast, beaten, good]) == [small, fast, good]
    assert pareto_front([small, small]) == [small, small]


def test_times() -> None:
    assert times(800, 100, "larger", "smaller") == "8x smaller"
    assert times(100, 125, "larger", "smaller") == "1.25x larger"


class Encoder(nn.Module):
    """Takes named inputs, as models of the transformers library do; its output has `.logits`."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, 4)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.encoder(tokens))}


@pytest.mark.parametrize("opened", [False, True])
def test_dicts_of_tokens_some_of_which_do_not_count(opened: bool, tmp_path) -> None:
    torch.manual_seed(0)
    encoder, teacher = Encoder(), Encoder()
    if opened:
        kdq.open_attention_(encoder)
    attention = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] if opened else []
    labels = torch.tensor([[0, 3, -100], [-100, -100, -100], [2, -100, 1]])
    batches = [{"tokens": torch.randn(3, 3, 12), "labels": labels} for _ in range(2)]
    result = kdq.compress(encoder, batches, budget=BUDGET, teacher=teacher, folder=tmp_path, **SETTINGS)
    assert result.report.samples == 8
    assert {layer.name for layer in result.report.layers} == {
        *(f"encoder.layers.{i}.{name}" for i in range(2) for name in ("linear1", "linear2", *attention)),
        "head",
    }
    assert all(layer.sqnr_db is not None for layer in result.report.layers)
    assert result.report.teacher is not None


class Tied(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def test_a_shared_layer_has_one_precision(tmp_path) -> None:
    result = kdq.compress(Tied(), [torch.randn(8, 6)], budget=BUDGET, folder=tmp_path, **SETTINGS)
    assert result.plan["a"] == result.plan["b"]
    assert result.report.after.size_bytes == result.plan.size_bytes
    x = torch.randn(5, 6)
    assert torch.equal(result.model.a(x), result.model.b(x))


def test_unlabelled_training_with_a_labelled_validation(tmp_path) -> None:
    report = compressed(tmp_path, [data()[0]], teacher=model(3)).report
    assert report.after.accuracy is not None
    assert report.after.teacher_kl < report.before.teacher_kl


def test_hints_and_functions_as_losses_are_resumed(tmp_path) -> None:
    def losses():
        return [kdq.SoftTargets(), kdq.Hint({"0": "0"}), lambda student, teacher, target: (student**2).mean()]

    teacher = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
    whole = compressed(tmp_path / "whole", teacher=teacher, losses=losses())
    for batches in (2, 5):
        torch.manual_seed(batches)  # whatever the program drew meanwhile
        with pytest.raises(KeyboardInterrupt):
            compressed(tmp_path / "killed", Interrupted(batches), teacher=teacher, losses=losses())
    same(compressed(tmp_path / "killed", teacher=teacher, losses=losses()).model, whole.model)
    same(compressed(tmp_path / "killed", Interrupted(0), teacher=teacher, losses=losses()).model, whole.model)


def test_a_cached_teacher_is_asked_once_a_sample(tmp_path) -> None:
    cached = kdq.CachedTeacher(model(3), tmp_path / "logits")
    result = compressed(tmp_path / "run", teacher=cached)
    assert cached.misses == 64
    assert result.report.teacher is not None
    assert result.report.teacher.size_bytes == tensor_bytes(model(3))


def test_a_cached_teacher_notices_inputs_that_change_every_epoch(tmp_path) -> None:
    class Augmented:
        def __iter__(self) -> Iterator[Tensor]:
            yield torch.randn(16, 12)

    with pytest.warns(UserWarning, match="the inputs seem to change every epoch"):
        compressed(tmp_path / "run", Augmented(), teacher=kdq.CachedTeacher(model(3), tmp_path / "logits"))


def test_without_validation_a_shuffled_loader_is_seen_alike(tmp_path) -> None:
    results = []
    for name in ("one", "two"):
        torch.manual_seed(len(results))
        shuffled = DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True)
        results.append(compressed(tmp_path / name, shuffled, validation=None))
    same(results[0].model, results[1].model)
