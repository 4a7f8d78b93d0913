"""compress on bad input: errors that name their cause, before the training where they can; checkpoints are kept."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import kdq
from compress_runs import BUDGET, SETTINGS, Interrupted, checkpoint, compressed, data, loader, model, same


@pytest.fixture(autouse=True)
def _quickly(monkeypatch) -> None:
    """Short rounds of timing, and no pages."""
    for module in ("kdq.search.cost", "kdq.reporting"):
        monkeypatch.setattr(f"{module}.ROUND_SECONDS", 1e-5)
    monkeypatch.setattr("kdq.compression.road.CompressionReport.save_html", lambda self, path: path.write_text(""))


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


def test_a_budget_that_cannot_be_met_costs_no_training(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"average_bits=1\.5 cannot be met, the smallest is 2\.0"):
        compressed(tmp_path, Interrupted(0), budget=kdq.Budget(average_bits=1.5))


class Changing:
    """A loader that gives other numbers of batches, one after the other."""

    def __init__(self, *counts: int) -> None:
        self.counts = list(counts)

    def __iter__(self) -> Iterator[Tensor]:
        return iter([data()[0][:16]] * self.counts.pop(0))


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
    with pytest.raises(ValueError, match=r"loader: every epoch needs all batches, but an iterator \(generator\)"):
        compressed(tmp_path / "never", (batch for batch in loader()))
    assert not (tmp_path / "never").exists(), "nothing was trained"


@pytest.mark.parametrize(
    ("counts", "message", "phase", "epochs"),
    [
        ((0,), r"epoch 1 of distil: loader: it gave no batch \(", "distil", 0),
        ((3, 2), "epoch 2 of distil: loader: expected 3 batches as in the first epoch, got 2", "distil", 1),
        ((3, 0), r"epoch 2 of distil: loader: it gave no batch \(", "distil", 1),
        ((3, 3, 4), "epoch 1 of finetune: loader: expected 3 batches as in the first epoch, got 4", "distil", 2),
        ((3, 3, 3, 0), r"epoch 2 of finetune: loader: it gave no batch \(", "finetune", 1),
    ],
)
def test_loaders_that_change_keep_the_checkpoint(counts, message: str, phase: str, epochs: int, tmp_path) -> None:
    """It is told where, and a loader that is mended goes on from there to the same end."""
    with pytest.raises(ValueError, match=message) as caught:
        compressed(tmp_path / "a", Changing(*counts))
    if epochs:
        file = checkpoint(tmp_path / "a", phase)
        assert (str(file) in str(caught.value)) == (f"of {phase}" in message)
        assert len(torch.load(file, weights_only=True)["losses"]) == epochs
    mended = compressed(tmp_path / "a", Changing(*[counts[0] or 3] * (4 - len(counts) + 1)))
    same(mended.model, compressed(tmp_path / "whole", Changing(*[counts[0] or 3] * 4)).model)


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(tmp_path) -> None:
    teacher = Diverging(calls=1 + 1 + 4 + 2)  # validation, the adapters' batch, an epoch, half an epoch
    with pytest.raises(RuntimeError, match="epoch 2 of distil: the loss is nan at step 3: lower") as caught:
        compressed(tmp_path, teacher=teacher, validation=[data()[0]])
    file = checkpoint(tmp_path, "distil")
    assert f"the checkpoint of the epoch before is {file}; it is kept" in str(caught.value)
    assert len(torch.load(file, weights_only=True)["losses"]) == 1


def test_another_learning_rate_keeps_an_unfinished_checkpoint(tmp_path) -> None:
    """Whoever comes back to the first goes on from it; what finished phases left is replaced."""
    whole = compressed(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compressed(tmp_path / "run", Interrupted(5))  # in the second epoch
    file = checkpoint(tmp_path / "run", "distil")
    content = file.read_bytes()
    slower = compressed(tmp_path / "run", lr=1e-4)
    assert file.read_bytes() == content
    first, second = slower.report.training[0].losses
    assert (first, second) != tuple(whole.report.training[0].losses)
    with pytest.raises(KeyboardInterrupt):
        compressed(tmp_path / "run", Interrupted(3))
    assert file.read_bytes() == content, "it had only an epoch to go"
    same(compressed(tmp_path / "run", Interrupted(4 + 8)).model, whole.model)
    assert checkpoint(tmp_path / "run", "distil") == file, "the other one was finished"


def test_hints_that_do_not_exist_keep_the_checkpoint(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compressed(tmp_path, Interrupted(5))
    file = checkpoint(tmp_path, "distil")
    content = file.read_bytes()
    for hint, message in (({"9": "0"}, "student.*'9'"), ({"0": "block"}, "teacher.*'block'")):
        with pytest.raises(ValueError, match=message):
            compressed(tmp_path, losses=[kdq.SoftTargets(), kdq.Hint(hint)])
    assert file.read_bytes() == content
    same(compressed(tmp_path, Interrupted(3 + 8 + 1)).model, compressed(tmp_path / "whole").model)


def test_teacher_of_other_classes(tmp_path) -> None:
    with pytest.raises(ValueError, match="logits of one shape"):
        compressed(tmp_path, teacher=nn.Linear(12, 5))


def test_folders(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="has files, but none of an earlier run"):
        compressed(tmp_path)
    whole = compressed(tmp_path / "run")
    checkpoint(tmp_path / "run", "distil").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"distil-\w+\.pt is damaged"):
        compressed(tmp_path / "run")
    checkpoint(tmp_path / "run", "distil").unlink()
    with pytest.raises(ValueError, match=r"distil-\w+\.pt of a finished phase is gone"):
        compressed(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("[")
    with pytest.raises(ValueError, match="is not a record of a run"):
        compressed(tmp_path / "run")
    assert isinstance(whole, kdq.Compressed)
