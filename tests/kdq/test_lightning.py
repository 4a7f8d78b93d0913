"""`DistillationModule` and `DistillationCallback` in the real Lightning, against `Distiller.fit`."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import kdq
from loop_cases import (
    CLIP,
    LOADER,
    Noisy,
    X,
    Y,
    cached_named,
    distiller_of,
    halving,
    parameter_count,
    same,
    tensors_in,
    warnings_of,
    without,
)
from small_models import mlp, randn


@pytest.fixture
def lightning(tmp_path: Path) -> Any:
    """Makes a Lightning Trainer, and the module."""
    library = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from kdq.integrations.lightning import DistillationModule

    def trainer(**options: Any) -> Any:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        options = {"logger": False, **quiet, **options}
        return library.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **options)

    return trainer, DistillationModule


@pytest.fixture
def own_module() -> Any:
    """Makes a LightningModule of the user's own, with the distiller as a plain attribute."""
    library = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Own(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, distiller: kdq.Distiller, **parts: Any) -> None:
            super().__init__()
            self.distiller, self.student = distiller, distiller.student
            self.progress: list[float] = []
            for name, part in parts.items():
                setattr(self, name, part)

        def training_step(self, batch: Any, _index: int) -> Tensor:
            self.progress.append(self.distiller.progress)
            return self.distiller.loss(batch)

        def validation_step(self, batch: Any, _index: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.distiller.parameters(), lr=1e-2)

    return Own


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:the teacher is worse")
def test_lightning_takes_the_steps_of_fit(lightning: Any, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    trainer, module = lightning
    ours, theirs = distiller_of(), distiller_of()
    logger = CSVLogger(tmp_path)
    held_out = DataLoader(TensorDataset(X, Y), batch_size=24)
    trainer(max_epochs=2, logger=logger, log_every_n_steps=1).fit(module(ours, lr=1e-2), LOADER, held_out)
    history = theirs.fit(LOADER, 2, lr=1e-2, validation=[(X, Y)], progress=False)
    same(ours.student, theirs.student)
    same(ours.adapters[1, "0"], theirs.adapters[1, "0"])
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    found = [row for row in rows if row["val_teacher_kl"]]
    for row, expected in zip(found, history.validation, strict=True):
        assert float(row["val_teacher_kl"]) == pytest.approx(expected.teacher_kl, rel=1e-5)
        assert float(row["val_accuracy"]) == pytest.approx(expected.accuracy)
    assert sum(bool(row["train_loss"]) for row in rows) == 6


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
def test_lightning_checkpoints_hold_no_teacher_and_go_on(lightning: Any, tmp_path: Path) -> None:
    trainer, module = lightning
    losses = [kdq.SoftTargets(), kdq.ContrastiveKD({"0": "0"}, width=4, queue=16)]
    whole, first, resumed = (distiller_of(losses=losses) for _ in range(3))
    before = copy.deepcopy(whole.teacher)
    trainer(max_epochs=3).fit(module(whole), LOADER)
    same(whole.teacher, before)
    half = trainer(max_epochs=2)
    half.fit(module(first), LOADER)
    half.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    expected = {f"student.{name}" for name in whole.student.state_dict()}
    assert {name for name in saved["state_dict"] if not name.startswith("own.")} == expected
    assert without(whole.teacher, tensors_in(saved))
    groups = saved["optimizer_states"][0]["param_groups"]
    trained = parameter_count([whole.student, *whole.own_modules()])
    assert sum(len(group["params"]) for group in groups) == trained
    trainer(max_epochs=3).fit(module(resumed), LOADER, ckpt_path=tmp_path / "a.ckpt")
    same(resumed.student, whole.student)
    same(resumed.own_modules()[0], whole.own_modules()[0])


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_accumulates_clips_and_schedules_as_fit(precision: str, lightning: Any) -> None:
    trainer, module = lightning
    ours, theirs = distiller_of(), distiller_of()

    class Scheduled(module):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving(optimizer), "interval": "step"}}

    batches = DataLoader(TensorDataset(X, Y), batch_size=6)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": CLIP, "precision": precision}
    trainer(max_epochs=2, **options).fit(Scheduled(ours, lr=1e-2), batches)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        theirs.fit(
            batches, 2, optimizer, scheduler=halving(optimizer), accumulate=2, clip_grad_norm=CLIP, progress=False
        )
    tolerance = (0.0, 0.0) if precision == "32-true" else (1e-2, 1e-3)  # the backward pass is not within the autocast
    same(ours.student, theirs.student, *tolerance)
    same(ours.adapters[1, "0"], theirs.adapters[1, "0"], *tolerance)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:the teacher is worse")
def test_lightning_stops_early_as_fit(lightning: Any, tmp_path: Path) -> None:
    """At a learning rate that leads nowhere: after the same epoch, and with the same best one."""
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    trainer, module = lightning
    ours, theirs = distiller_of(), distiller_of()
    watch = {"monitor": "val_teacher_kl", "mode": "min"}
    best = ModelCheckpoint(tmp_path, **watch)
    used = trainer(max_epochs=30, callbacks=[EarlyStopping(patience=2, **watch), best], enable_checkpointing=True)
    used.fit(module(ours, lr=0.3), LOADER, DataLoader(TensorDataset(X), batch_size=24))
    history = theirs.fit(LOADER, 30, lr=0.3, validation=[(X, None)], patience=2, progress=False)
    assert used.current_epoch == len(history.validation) < 30
    student = copy.deepcopy(theirs.student)
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    student.load_state_dict({name.removeprefix("student."): value for name, value in state.items()})
    same(student, theirs.student)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:the teacher is worse")
def test_callback_serves_a_module_of_ones_own(lightning: Any, own_module: Any, tmp_path: Path) -> None:
    """A training in two halves is `fit`: weights, adapters, the progress that schedules see, and validation."""
    from lightning.pytorch.callbacks import LambdaCallback
    from lightning.pytorch.loggers import CSVLogger

    from kdq.integrations.lightning import DistillationCallback

    trainer, _ = lightning
    losses = [
        kdq.Weighted(kdq.SoftTargets(), lambda progress: 1 - progress),
        kdq.ContrastiveKD({"0": "0"}, 4, queue=16),
    ]
    first, second, theirs = (distiller_of(losses=losses) for _ in range(3))
    before = copy.deepcopy(first.teacher)
    held_out = DataLoader(TensorDataset(X, Y), batch_size=24)
    options: dict[str, Any] = {"max_epochs": 4, "log_every_n_steps": 1}
    stop = LambdaCallback(on_train_epoch_end=lambda used, _: setattr(used, "should_stop", used.current_epoch == 1))
    half = trainer(callbacks=[DistillationCallback(first), stop], **options)
    half.fit(own_module(first), LOADER, held_out)
    assert half.current_epoch == 2
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"student.{name}" for name in first.student.state_dict()}
    assert without(first.teacher, tensors_in(saved))
    same(first.teacher, before)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    logger, module = CSVLogger(tmp_path), own_module(second)
    rest = trainer(callbacks=[DistillationCallback(second, with_accuracy=True)], logger=logger, **options)
    rest.fit(module, LOADER, held_out, ckpt_path=tmp_path / "half.ckpt")
    history = theirs.fit(LOADER, 4, lr=1e-2, validation=[(X, Y)], progress=False)
    same(second.student, theirs.student)
    same(second.own_modules()[0], theirs.own_modules()[0])
    assert module.progress == [step / 12 for step in range(6, 12)]
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    found = [(float(r["val_teacher_kl"]), float(r["val_accuracy"])) for r in rows if r["val_teacher_kl"]]
    assert found[-2:] == [pytest.approx((v.teacher_kl, v.accuracy), rel=1e-5) for v in history.validation[2:]]


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
def test_mistakes_with_lightning_are_named(lightning: Any, own_module: Any) -> None:
    from kdq.integrations.lightning import DistillationCallback

    trainer, module = lightning

    def fit(distiller: kdq.Distiller, own: Any) -> None:
        trainer(max_epochs=1, callbacks=[DistillationCallback(distiller)]).fit(own, LOADER)

    distiller = distiller_of()
    with pytest.raises(ValueError, match="its student is not a submodule"):
        fit(distiller_of(), own_module(distiller))
    with pytest.raises(ValueError, match="its teacher is a submodule"):
        fit(distiller, own_module(distiller, teacher=distiller.teacher))
    for chosen, message in (
        ([*distiller.parameters(), *distiller.teacher.parameters()], "it has the teacher's parameters"),
        (distiller.student.parameters(), "it lacks the adapters"),
    ):
        own = own_module(distiller)
        own.configure_optimizers = lambda parameters=list(chosen): torch.optim.Adam(parameters)
        with pytest.raises(ValueError, match=f"optimizer: {message}"):
            fit(distiller, own)
    with pytest.raises(ValueError, match="keeps the teacher as it is"):
        module(kdq.Distiller(mlp(3), mlp(3), [kdq.SoftTargets()], train_teacher=True))
    with pytest.raises(RuntimeError, match="call distiller.prepare"):
        module(kdq.Distiller(mlp(3), mlp(4), [kdq.Hint({"0": "0"})]))


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
@pytest.mark.parametrize("validated", [False, True])
def test_lightning_tells_a_cached_teacher_how_many_samples_there_are(
    lightning: Any, validated: bool, tmp_path: Path
) -> None:
    trainer, module = lightning
    same_rows = TensorDataset(X, Y)
    held_out = [DataLoader(TensorDataset(X + 1, Y), batch_size=24)] if validated else []
    for rows, warned in ((same_rows, False), (Noisy(same_rows), True)):
        cached, distiller = cached_named(tmp_path / str(warned))
        fit = trainer(max_epochs=5 if validated else 3).fit
        loader = DataLoader(rows, batch_size=8, shuffle=True)
        assert bool(warnings_of(lambda f=fit, d=distiller, b=loader: f(module(d), b, *held_out))) == warned
        assert cached.storing != warned
    cached, distiller = cached_named(tmp_path / "after")
    trainer(max_epochs=1).fit(module(distiller), LOADER)
    assert not warnings_of(lambda: [cached(randn(24, 6, seed=s)) for s in range(9)]), "other data, later"


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
def test_lightning_with_loaders_that_have_no_length_tells_nothing(lightning: Any, tmp_path: Path) -> None:
    trainer, module = lightning

    class Batches:
        def __iter__(self) -> Any:
            return iter(DataLoader(Noisy(TensorDataset(X, Y)), batch_size=8))

    cached, distiller = cached_named(tmp_path / "logits")
    assert not warnings_of(lambda: trainer(max_epochs=4).fit(module(distiller), Batches()))
    assert cached.storing


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
def test_lightning_with_a_data_set_of_batches_tells_nothing(lightning: Any, tmp_path: Path) -> None:
    """Its length is that of the loader, not the number of samples."""
    trainer, module = lightning
    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 24, 8)]
    cached, distiller = cached_named(tmp_path / "logits")
    loader = DataLoader(batches, batch_size=None)
    assert not warnings_of(lambda: trainer(max_epochs=2).fit(module(distiller), loader))
    assert cached.storing
    assert cached.misses == 24


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("counts", [False, True], ids=["no row counts", "some count later"])
def test_lightning_logs_nothing_where_no_row_counts(counts: bool, lightning: Any) -> None:
    """As in the sanity check, which sees the first two batches."""
    trainer, module = lightning
    distiller = distiller_of()
    target = torch.full((24,), -100)
    target[16:] = Y[16:] if counts else -100
    used = trainer(max_epochs=1)
    used.fit(module(distiller), LOADER, DataLoader(TensorDataset(X, target), batch_size=8))
    assert ("val_teacher_kl" in used.logged_metrics) == ("val_accuracy" in used.logged_metrics) == counts


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
def test_lightning_leaves_nothing_set_after_an_exception(lightning: Any, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import LambdaCallback

    trainer, module = lightning
    cached, distiller = cached_named(tmp_path / "logits")
    own = module(distiller)

    def fail(*_: Any) -> None:
        distiller.within = own  # as with several processes
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(max_epochs=1, callbacks=[LambdaCallback(on_train_epoch_end=fail)]).fit(own, LOADER)
    assert distiller.within is None
    assert not warnings_of(lambda: [cached(randn(24, 6, seed=s)) for s in range(9)]), "other data, later"


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
def test_lightning_checkpoints_without_the_callback_are_named(lightning: Any, own_module: Any, tmp_path: Path) -> None:
    from kdq.integrations.lightning import DistillationCallback

    trainer, _ = lightning
    bare = trainer(max_epochs=1)
    bare.fit(own_module(distiller_of()), LOADER)
    bare.save_checkpoint(tmp_path / "bare.ckpt")
    distiller = distiller_of()
    with pytest.raises(RuntimeError, match=r"checkpoint: 'distiller' is missing.*without a DistillationCallback"):
        trainer(max_epochs=2, callbacks=[DistillationCallback(distiller)]).fit(
            own_module(distiller), LOADER, ckpt_path=tmp_path / "bare.ckpt"
        )
