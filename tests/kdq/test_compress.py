"""compress: the whole road in one call, interrupted and taken up again, and what it says about bad input."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdq
from kdq.checkpoint import write_atomically
from kdq.compression import road
from kdq.compression.folder import RunFolder
from kdq.compression.report import CompressionReport, Model, pareto_front, times
from kdq.search.cost import tensor_bytes

CANDIDATES = [kdq.Int8Dynamic(), kdq.LowBit(weight_bits=2, act_bits=8)]
BUDGET = kdq.Budget(average_bits=4.0)
SETTINGS = {"candidates": CANDIDATES, "epochs": 2, "finetune_epochs": 2, "progress": False}


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


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.BatchNorm1d(16), nn.Linear(16, 4)).eval()


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    return x, x[:, :4].argmax(1)


def loader(**options: object) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True, generator=generator, **options)


class Interrupted:
    """A loader that is killed at its n-th batch."""

    def __init__(self, batches: int) -> None:
        self.loader, self.left = loader(), batches
        self.generator = self.loader.generator

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in self.loader:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


def compressed(folder: Path, batches=None, **changed) -> kdq.Compressed:
    arguments = {"budget": BUDGET, "validation": [data()], **SETTINGS, **changed}
    return kdq.compress(model(), loader() if batches is None else batches, folder=folder, **arguments)


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


def same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_finished_phases_are_not_repeated(tmp_path) -> None:
    whole = compressed(tmp_path)
    same(compressed(tmp_path, Interrupted(0)).model, whole.model)
    smaller = compressed(tmp_path, Interrupted(8), budget=kdq.Budget(average_bits=2.5))  # only the finetune's batches
    assert smaller.plan.average_bits <= 2.5
    with pytest.raises(KeyboardInterrupt):
        compressed(tmp_path, Interrupted(0), seed=1)


def test_a_budget_that_cannot_be_met_costs_no_training(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"average_bits=1\.5 cannot be met, the smallest is 2\.0"):
        compressed(tmp_path, Interrupted(0), budget=kdq.Budget(average_bits=1.5))


def test_a_teacher_that_is_worse_is_named(tmp_path) -> None:
    student = model()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    x, y = data()
    for _ in range(60):
        nn.functional.cross_entropy(student(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(UserWarning, match="the teacher is worse than the student"):
        kdq.compress(student, loader(), budget=BUDGET, teacher=model(3), folder=tmp_path, **SETTINGS)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["teacher"]["accuracy"] < report["before"]["accuracy"]


class Shrinking:
    def __init__(self) -> None:
        self.count = 4

    def __iter__(self) -> Iterator[Tensor]:
        self.count -= 1
        return iter([data()[0][:16]] * self.count)


class Diverging(nn.Module):
    """Finite until it has been called so often."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(12, 4), calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        return self.linear(x) * (float("nan") if self.calls < 0 else 1.0)


def test_bad_loaders(tmp_path) -> None:
    with pytest.raises(ValueError, match="loader: expected at least one batch, got none"):
        kdq.compress(model(), [], budget=BUDGET, folder=tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="validation: expected at least one batch, got none"):
        compressed(tmp_path, validation=[])
    with pytest.raises(ValueError, match="expected 3 batches as in the first epoch, got 2 in epoch 2 of distil"):
        compressed(tmp_path, Shrinking())


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(tmp_path) -> None:
    teacher = Diverging(calls=1 + 1 + 4 + 2)  # validation, the adapters' batch, an epoch, half an epoch
    with pytest.raises(RuntimeError, match="epoch 2 of distil: the loss is nan at step 3"):
        compressed(tmp_path, teacher=teacher, validation=[data()[0]])
    state = torch.load(tmp_path / "distil.pt", weights_only=True)
    assert len(state["losses"]) == 1


def test_teacher_of_other_classes(tmp_path) -> None:
    with pytest.raises(ValueError, match="logits of one shape"):
        compressed(tmp_path, teacher=nn.Linear(12, 5))


def test_folders(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="has files, but none of an earlier run"):
        compressed(tmp_path)
    whole = compressed(tmp_path / "run")
    (tmp_path / "run" / "distil.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"distil\.pt is damaged"):
        compressed(tmp_path / "run")
    (tmp_path / "run" / "distil.pt").unlink()
    with pytest.raises(ValueError, match=r"distil\.pt of a finished phase is gone"):
        compressed(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("[")
    with pytest.raises(ValueError, match="is not a record of a run"):
        compressed(tmp_path / "run")
    assert isinstance(whole, kdq.Compressed)


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


def test_dicts_of_tokens_some_of_which_do_not_count(tmp_path) -> None:
    torch.manual_seed(0)
    encoder, teacher = Encoder(), Encoder()
    labels = torch.tensor([[0, 3, -100], [-100, -100, -100], [2, -100, 1]])
    batches = [{"tokens": torch.randn(3, 3, 12), "labels": labels} for _ in range(2)]
    result = kdq.compress(encoder, batches, budget=BUDGET, teacher=teacher, folder=tmp_path, **SETTINGS)
    assert result.report.samples == 8
    assert {layer.name for layer in result.report.layers} == {
        *(f"encoder.layers.{i}.linear{j}" for i in range(2) for j in (1, 2)),
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"candidates": [kdq.Binary()]}, "candidates: expected at least two different ones"),
        ({"candidates": [kdq.Binary(), kdq.LowBit(weight_bits=1, act_bits=1)]}, "candidates: expected at least two"),
        ({"epochs": 0}, "epochs: expected at least 1"),
        ({"budget": kdq.Budget(size_bytes=10)}, "size_bytes=10 cannot be met, the smallest is"),
    ],
)
def test_bad_arguments(changed: dict, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        compressed(tmp_path, Interrupted(0), **changed)


def test_a_model_without_linear_layers(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"model: expected an nn\.Linear that can be quantized"):
        kdq.compress(nn.Sequential(nn.ReLU()), loader(), budget=BUDGET, folder=tmp_path)
