"""`DistillationTrainer` in the real transformers: the steps of `Distiller.fit`, checkpoints without the teacher."""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import kdq
from kdq.validation import validate
from loop_cases import (
    CLIP,
    LOADER,
    ROWS,
    Noisy,
    X,
    Y,
    cached_named,
    named,
    parameter_count,
    same,
    tensors_in,
    warnings_of,
    without,
)
from small_models import mlp, randn


@pytest.mark.parametrize(
    ("module", "library"), [("transformers", "transformers"), ("lightning", "lightning.pytorch")], ids=str
)
def test_a_missing_library_is_named(module: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"kdq.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'kdq-kernels\[{module}\]'"):
        importlib.import_module(f"kdq.integrations.{module}")


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
