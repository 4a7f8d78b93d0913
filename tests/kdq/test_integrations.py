"""Distillation in the loops of transformers, Lightning and Accelerate: the steps of `fit`, the teacher in no file."""

from __future__ import annotations

import copy
import csv
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdq
from kdq.validation import validate
from small_models import TWO, mlp, randn

X = randn(24, 6)
Y = X[:, :4].argmax(1)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=8)
CLIP = 0.05  # below the norms of all gradients here


def distiller_of(config: Any = TWO, losses: Any = None) -> kdq.Distiller:
    """A student with dropout, a batch norm and learned scales, which start from the first batch that a model sees."""
    torch.manual_seed(1)
    student = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    if config is not None:
        kdq.prepare_qat_(student, config)
    distiller = kdq.Distiller(mlp(32), student, losses or [kdq.SoftTargets(alpha=0.5), kdq.Hint({"0": "0"})])
    distiller.prepare((X, Y))
    return distiller


def same(one: nn.Module, other: nn.Module, rtol: float = 0.0, atol: float = 0.0) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def parameter_count(modules: list[nn.Module]) -> int:
    return len([p for module in modules for p in module.parameters() if p.requires_grad])


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for entry in entries for tensor in tensors_in(entry)]


def without(teacher: nn.Module, tensors: list[Tensor]) -> bool:
    """Whether no weight of the teacher is among them."""
    return bool(tensors) and not any(
        a.shape == b.shape and torch.equal(a.float(), b.float()) for a in teacher.parameters() for b in tensors
    )


@pytest.mark.parametrize(
    ("module", "library"), [("transformers", "transformers"), ("lightning", "lightning.pytorch")], ids=str
)
def test_a_missing_library_is_named(module: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"kdq.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'kdq-kernels\[{module}\]'"):
        importlib.import_module(f"kdq.integrations.{module}")


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer_of(tmp_path: Path) -> Any:
    """Makes a DistillationTrainer; the process that a test runs in is the only one, on the CPU."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from kdq.integrations.transformers import DistillationTrainer

    def make(
        distiller: kdq.Distiller,
        data: Any,
        evaluated: Any = None,
        metrics: Any = None,
        loss: Any = None,
        **options: Any,
    ) -> Any:
        options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", **options}
        arguments = transformers.TrainingArguments(str(tmp_path), **options)
        return DistillationTrainer(
            distiller,
            arguments,
            train_dataset=data,
            eval_dataset=evaluated,
            compute_metrics=metrics,
            compute_loss_func=loss,
        )

    return make


class Named(nn.Module):
    """The student of `distiller_of`, called as Trainer does."""

    def __init__(self, body: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.body, self.dropout = body, nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        y: Tensor = self.body(self.dropout(features))
        return y


def named(dropout: float = 0.0, config: Any = TWO, hint: bool = True) -> kdq.Distiller:
    plain = distiller_of(config)
    losses = [kdq.SoftTargets(alpha=0.5), kdq.Hint({"body.0": "body.0"})]
    distiller = kdq.Distiller(Named(plain.teacher), Named(plain.student, dropout), losses[: 1 + hint])
    torch.manual_seed(2)
    distiller.prepare((X, Y))
    return distiller


ROWS = [{"features": x, "labels": y} for x, y in zip(X, Y, strict=True)]


class Noisy:
    """Rows that are others each time."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        row = self.rows[i]
        if isinstance(row, dict):
            return {**row, "features": row["features"] + 0.1 * torch.randn(6)}
        return row[0] + 0.1 * torch.randn(6), row[1]


def cached_named(folder: Path) -> tuple[kdq.CachedTeacher, kdq.Distiller]:
    """A distiller of logits alone, whose teacher is cached."""
    cached = kdq.CachedTeacher(Named(mlp(16)), folder)
    return cached, kdq.Distiller(cached, Named(mlp(8, seed=1)), [kdq.SoftTargets()])


def warnings_of(call: Any) -> list[Any]:
    """Those that the call gave of a CachedTeacher."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if "CachedTeacher" in str(w.message)]


@pytest.mark.parametrize(("schedule", "clip"), [("constant", 0.0), ("linear", CLIP), ("cosine", CLIP)])
def test_trainer_takes_the_steps_of_fit(schedule: str, clip: float, trainer_of: Any) -> None:
    """All rows in one step, accumulated over batches: in whatever order they come, it is one gradient (up to rounding,
    which would grow where integers flip: the student is a float one). Trainer clips no gradients of adapters."""
    from transformers import get_scheduler

    ours, theirs = (named(config=None, hint=not clip) for _ in range(2))
    for module in (ours.student.body[1], theirs.student.body[1]):
        module.eval()  # statistics of a batch would depend on the order
        module.train = lambda mode=True: None
    sgd = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": schedule, "max_grad_norm": clip}
    trainer = trainer_of(
        ours, ROWS, num_train_epochs=3, per_device_train_batch_size=8, gradient_accumulation_steps=3, **sgd
    )
    trainer.train()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    options: dict[str, Any] = {"scheduler": get_scheduler(schedule, optimizer, 0, 3), "clip_grad_norm": clip or None}
    norms: list[float] = []
    options["log"] = lambda _, told: norms.append(told.get("grad_norm", 0.0))
    theirs.fit(LOADER, 3, optimizer, accumulate=3, progress=False, **options)
    assert min(norms) > clip or not clip, "all steps are clipped"
    same(ours.student, theirs.student, 1e-4, 1e-6)
    for adapter, other in zip(ours.own_modules(), theirs.own_modules(), strict=True):
        same(adapter, other, 1e-4, 1e-6)


def test_trainer_puts_the_best_model_and_its_adapters_back(trainer_of: Any) -> None:
    """By scores that are best after the second epoch, so that EarlyStoppingCallback ends it after the fourth."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    distiller = named()
    scores = iter([0.5, 0.9, 0.8, 0.7, 0.6])
    after: list[kdq.Distiller] = []

    class Keep(TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            after.append(copy.deepcopy(distiller))

    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "score", "greater_is_better": True}
    trainer = trainer_of(
        distiller, ROWS, ROWS, lambda _: {"score": next(scores)}, num_train_epochs=5, learning_rate=1e-2, **best
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.add_callback(Keep())
    trainer.train()
    assert len(after) == 4
    same(distiller.student, after[1].student)
    same(distiller.own_modules()[0], after[1].own_modules()[0])
    assert not torch.equal(*(next(each.own_parameters()) for each in (after[1], after[3])))


@pytest.mark.parametrize("hint", [False, True], ids=["nothing beside", "an adapter"])
def test_trainer_without_the_best_adapters_ends(hint: bool, trainer_of: Any, tmp_path: Path) -> None:
    """The student is put back; the adapters, whose file is gone, are those of the last step, and a warning says so."""
    from transformers import TrainerCallback

    distiller = named(hint=hint)
    scores = iter([0.9, 0.5])
    after: list[kdq.Distiller] = []

    class Lose(TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            after.append(copy.deepcopy(distiller))

        def on_save(self, *_: Any, **__: Any) -> None:
            for file in tmp_path.glob("*/distiller.pt"):
                file.unlink()

    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "score", "greater_is_better": True}
    trainer = trainer_of(
        distiller, ROWS, ROWS, lambda _: {"score": next(scores)}, num_train_epochs=2, learning_rate=1e-2, **best
    )
    trainer.add_callback(Lose())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert sum("distiller.pt is missing" in str(w.message) for w in caught) == hint
    same(distiller.student, after[0].student)
    for module, last in zip(distiller.own_modules(), after[1].own_modules(), strict=True):
        same(module, last)


def test_trainer_leaves_nothing_set_after_an_exception(trainer_of: Any, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    cached, distiller = cached_named(tmp_path / "logits")

    class Fail(TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            distiller.within = distiller.student  # as with several processes
            raise RuntimeError("on purpose")

    trainer = trainer_of(distiller, ROWS)
    trainer.add_callback(Fail())
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    assert distiller.within is None
    assert not warnings_of(lambda: [cached(features=randn(24, 6, seed=s)) for s in range(9)]), "other data, later"


def test_trainer_checkpoints_hold_no_teacher_and_go_on(trainer_of: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    options = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "save_strategy": "epoch"}
    whole = named(dropout=0.2)
    before = copy.deepcopy(whole.teacher)
    trainer_of(whole, ROWS, **options).train()
    same(whole.teacher, before)
    folder = tmp_path / "checkpoint-3"
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == whole.student.state_dict().keys()
    others = [torch.load(folder / name, weights_only=True) for name in ("optimizer.pt", "distiller.pt")]
    assert without(whole.teacher, [*weights.values(), *tensors_in(others)])
    groups = others[0]["param_groups"]
    trained = parameter_count([whole.student, *whole.own_modules()])
    assert sum(len(group["params"]) for group in groups) == trained
    resumed = named(dropout=0.2)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    trainer_of(resumed, ROWS, **options).train(resume_from_checkpoint=str(folder))
    same(resumed.student, whole.student)
    same(resumed.adapters[1, "body.0"], whole.adapters[1, "body.0"])
    (folder / "distiller.pt").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*distiller\.pt is missing"):
        trainer_of(named(), ROWS, **options).train(resume_from_checkpoint=str(folder))


def test_trainer_evaluates_the_student(trainer_of: Any) -> None:
    distiller = named()

    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    metrics = trainer_of(distiller, ROWS, ROWS, accuracy, per_device_eval_batch_size=24).evaluate()
    assert metrics["eval_accuracy"] == validate(distiller.student, distiller.teacher, [(X, Y)]).accuracy
    distiller.student.eval()
    assert metrics["eval_loss"] == pytest.approx(float(distiller.loss((X, Y)).detach()), rel=1e-5)


def test_trainer_decays_no_scales(trainer_of: Any) -> None:
    distiller = named()
    optimizer = trainer_of(distiller, ROWS, weight_decay=0.1).create_optimizer()
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in distiller.student.named_parameters() if id(p) in decayed}
    assert {"body.0.weight", "body.3.weight"} <= names
    assert not any("scale" in name or "zero_point" in name for name in names)


def test_trainer_of_a_causal_language_model(trainer_of: Any) -> None:
    """From a Hugging Face config to a converted student, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    teacher, student = LlamaForCausalLM(config), LlamaForCausalLM(config)
    assert len(kdq.prepare_qat_(student, kdq.LowBit(weight_bits=4, act_bits=8)).changed) == 8
    ids = torch.randint(12, (32, 9))
    rows = [{"input_ids": row, "attention_mask": torch.ones(9, dtype=torch.long), "labels": row} for row in ids]
    distiller = kdq.Distiller(teacher, student, [kdq.SoftTargets(T=1.0)])
    before = validate(student, teacher, [{"input_ids": ids, "labels": ids}])
    options = {"num_train_epochs": 8, "learning_rate": 1e-2, "bf16": True}
    trainer = trainer_of(distiller, rows, rows, **options)
    trainer.train()
    trainer.evaluate()
    after = validate(student, teacher, [{"input_ids": ids, "labels": ids}])
    assert after.teacher_kl < 0.5 * before.teacher_kl
    kdq.convert_(student)
    assert student(ids).logits.shape == (32, 9, 12)


@pytest.mark.filterwarnings("ignore:.*model-agnostic default `max_length`")
def test_trainer_mixes_with_another_kind(trainer_of: Any, tmp_path: Path) -> None:
    """An encoder-decoder in Seq2SeqTrainer, whose evaluation generates."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    from kdq.integrations.transformers import DistillationTrainer

    class Mine(DistillationTrainer, Seq2SeqTrainer):
        pass

    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    teacher, student = T5ForConditionalGeneration(config), T5ForConditionalGeneration(config)
    kdq.prepare_qat_(student, kdq.LowBit(weight_bits=4, act_bits=8))
    ids = torch.randint(2, 12, (16, 5))
    rows = [{"input_ids": row, "labels": row, "decoder_input_ids": row.roll(1)} for row in ids]
    distiller = kdq.Distiller(teacher, student, [kdq.SoftTargets(T=1.0)])
    generated: list[Any] = []

    def count(found: Any) -> dict[str, float]:
        generated.append(found.predictions)
        return {"count": float(len(found.predictions))}

    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", num_train_epochs=8,
        learning_rate=1e-2, predict_with_generate=True,
    )  # fmt: skip
    trainer = Mine(distiller, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=count)
    batch = {"input_ids": ids, "labels": ids, "decoder_input_ids": ids.roll(1, 1)}
    before = float(distiller.loss(batch).detach())
    trainer.train()
    assert trainer.evaluate()["eval_count"] == 16
    assert generated[0].dtype.kind == "i", "tokens, not logits"
    assert float(distiller.loss(batch).detach()) < 0.5 * before


@pytest.mark.parametrize("evaluated", [None, ROWS, {"a": ROWS[:8], "b": ROWS[8:]}], ids=["none", "one", "dict"])
def test_trainer_tells_a_cached_teacher_how_many_samples_there_are(
    trainer_of: Any, evaluated: Any, tmp_path: Path
) -> None:
    """24 samples, and as many for evaluation: without a repeat, a warning past twice as many."""
    data, epochs = Noisy(ROWS), 3 if evaluated is None else 5
    for rows, warned in ((ROWS, False), (data, True)):
        cached, distiller = cached_named(tmp_path / str(warned))
        options = {"num_train_epochs": epochs, "eval_strategy": "no" if evaluated is None else "epoch"}
        trainer = trainer_of(distiller, rows, evaluated, per_device_train_batch_size=8, **options)
        assert bool(warnings_of(trainer.train)) == warned
        assert cached.storing != warned
    cached, distiller = cached_named(tmp_path / "after")
    trainer_of(distiller, ROWS, num_train_epochs=1).train()
    assert not warnings_of(lambda: [cached(features=randn(24, 6, seed=s)) for s in range(9)]), "other data, later"


def test_trainer_of_a_stream_tells_nothing(trainer_of: Any, tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(Noisy(ROWS))

    cached, distiller = cached_named(tmp_path / "logits")
    assert not warnings_of(trainer_of(distiller, Stream(), max_steps=12).train)
    assert cached.storing


def test_mistakes_with_the_trainer_are_named(trainer_of: Any) -> None:
    with pytest.raises(ValueError, match="compute_loss_func, label_smoothing_factor: the loss is"):
        trainer_of(named(), ROWS, loss=lambda *_: None)
    taught = kdq.Distiller(mlp(3), mlp(3), [kdq.SoftTargets()], train_teacher=True)
    with pytest.raises(ValueError, match="train_teacher"):
        trainer_of(taught, ROWS)
    with pytest.raises(RuntimeError, match="call distiller.prepare"):
        trainer_of(kdq.Distiller(mlp(3), mlp(4), [kdq.Hint({"0": "0"})]), ROWS)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


# ---- Lightning -------------------------------------------------------------------------------------------------------


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


# ---- Accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "clip"), [("no", None), ("no", CLIP), ("bf16", None)])
def test_accelerate_needs_nothing_but_the_loss(precision: str, clip: float | None, tmp_path: Path) -> None:
    """If gradients are clipped, the learning rate falls, too."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    ours, theirs = distiller_of(), distiller_of()
    batches = DataLoader(TensorDataset(X, Y), batch_size=6)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=precision, project_dir=tmp_path
    )
    student, adapter = ours.student.train(), ours.adapters[1, "0"]
    optimizer = torch.optim.Adam(ours.parameters(), lr=1e-2)
    scheduler = halving(optimizer) if clip else None
    student, adapter, optimizer, loader, scheduler = accelerator.prepare(
        student, adapter, optimizer, batches, scheduler
    )
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(student), accelerator.autocast():
                accelerator.backward(ours.loss(batch))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(ours.parameters(), clip)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    options: dict[str, Any] = {"scheduler": halving(adam) if clip else None, "clip_grad_norm": clip}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        theirs.fit(batches, 2, adam, accumulate=2, progress=False, **options)
    tolerance = (0.0, 0.0) if precision == "no" else (1e-2, 1e-3)  # accelerate turns the logits to float32
    same(ours.student, theirs.student, *tolerance)
    same(ours.adapters[1, "0"], theirs.adapters[1, "0"], *tolerance)
    accelerator.save_state(str(tmp_path / "state"))
    kept = [torch.load(file, weights_only=False) for file in (tmp_path / "state").glob("*.bin")]
    from safetensors.torch import load_file

    weights = [load_file(file) for file in (tmp_path / "state").glob("*.safetensors")]
    assert [set(w) for w in weights if len(w) > 2] == [set(student.state_dict())]
    assert without(ours.teacher, tensors_in([*kept, *weights]))
