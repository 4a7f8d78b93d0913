"""What loaders yield and models return: batches and outputs of every kind give the same loss, and the right rows."""

from __future__ import annotations

from collections import UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdq
from kdq.observe import parse_batch
from kdq.validation import validate
from small_models import mlp, randn

X, Y = randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
Pair = namedtuple("Pair", ["x", "y"])


class Two(nn.Module):
    """Two inputs, the second by keyword if wanted; its output in the given form."""

    def __init__(self, seed: int, form: Any = lambda logits: logits) -> None:
        super().__init__()
        self.body, self.form = mlp(8, seed), form

    def forward(self, features: Tensor, shift: Any = 0.0) -> Any:
        if isinstance(shift, dict):
            (shift,) = shift["inner"]
        return self.form(self.body(features + shift))


def loss_of(batch: Any, form: Any = lambda logits: logits) -> Tensor:
    return kdq.Distiller(Two(0, form), Two(1, form), [kdq.SoftTargets(alpha=0.5)]).loss(batch)


@pytest.mark.parametrize(
    "batch",
    [
        (X - 1, torch.ones(1), Y),
        [X - 1, torch.ones(1), Y],
        ((X - 1, torch.ones(1)), Y),
        [[X - 1, torch.ones(1)], Y],
        ({"features": X - 1, "shift": torch.ones(1)}, Y),
        {"features": X - 1, "shift": {"inner": [torch.ones(1)]}, "label_ids": Y},
        UserDict({"features": X, "targets": Y}),
        Pair(X, Y),
        (X, Y),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_batches_of_every_kind_are_the_same(batch: Any) -> None:
    torch.testing.assert_close(loss_of(batch), loss_of({"features": X, "labels": Y}))


@pytest.mark.parametrize(
    "form",
    [
        lambda logits: (logits, "more"),
        lambda logits: [logits],
        lambda logits: {"logits": logits, "loss": None},
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: namedtuple("Output", ["loss", "logits"])(None, logits),
    ],
)
def test_outputs_of_every_kind_are_the_same(form: Any) -> None:
    assert torch.equal(loss_of((X, Y), form), loss_of((X, Y)))


@pytest.mark.parametrize("batch", [(X, None), ((X, 0.0), None), ((X, 0.0),), [X], X, {"features": X}])
def test_batches_without_labels(batch: Any) -> None:
    assert parse_batch(batch, mlp(3)).target is None
    assert torch.isfinite(kdq.Distiller(Two(0), Two(1), [kdq.SoftTargets()]).loss(batch))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (3, "batch: expected .*got int"),
        ((), "batch: expected .*got an empty tuple"),
        ((X, "cat"), "target: expected a tensor of class indices or None, got str"),
        ({"features": X, "labels": Y, "target": Y}, "batch: expected one of the keys .*got labels, target"),
    ],
)
def test_other_batches_are_named(batch: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        loss_of(batch)


@pytest.mark.parametrize("form", [lambda logits: (logits.sum(), logits), lambda _: {"loss": 1}, lambda _: ()])
def test_outputs_without_logits_are_named(form: Any) -> None:
    with pytest.raises(TypeError, match="teacher: expected a tensor of logits"):
        loss_of((X, Y), form)


def test_tensors_go_to_the_model_wherever_they_lie() -> None:
    packed = nn.utils.rnn.pack_sequence([randn(3, 2), randn(2, 2)])
    batch = parse_batch(([packed, {"a": [X]}], Y), nn.Linear(1, 1, device="meta"))
    assert type(batch.args[0]) is type(packed)
    assert {batch.args[0].data.device.type, batch.args[1]["a"][0].device.type, batch.target.device.type} == {"meta"}


# ---- tokens ----------------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Logits `[N, time, C]` of embedded tokens."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.head(self.embed(input_ids))
        return y


IDS = torch.randint(9, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.tensor([[7], [4], [2]])).long()


def test_padding_teaches_nothing() -> None:
    """Without labels the attention mask says which tokens count; with labels, -100 does."""
    teacher, student = Tagger(0), Tagger(1)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    p, q = (model(IDS)[MASK.bool()].double().log_softmax(-1) for model in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    distiller = kdq.Distiller(teacher, student, [kdq.SoftTargets(T=1.0)])
    torch.testing.assert_close(distiller.loss(batch).double(), expected)
    assert validate(student, teacher, [batch]).teacher_kl == pytest.approx(float(expected.detach()), rel=1e-5)
    labels = IDS.masked_fill(MASK == 0, -100)
    torch.testing.assert_close(distiller.loss({"input_ids": IDS, "labels": labels}).double(), expected)


def llama(seed: int) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def test_labels_of_causal_language_models_are_shifted() -> None:
    """As the model itself shifts them, padding and all."""
    student = llama(1)
    labels = IDS.masked_fill(MASK == 0, -100)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    distiller = kdq.Distiller(llama(0), student, [kdq.CrossEntropy()])
    torch.testing.assert_close(distiller.loss(batch), student(**batch).loss)
    shifted = {**batch, "shift_labels": F.pad(labels[:, 1:], (0, 1), value=-100)}
    del shifted["labels"]
    assert torch.equal(distiller.loss(shifted), distiller.loss(batch))
    found = validate(student, llama(0), [batch])
    right = (student(IDS, MASK).logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100]
    assert found.accuracy == pytest.approx(float(right.double().mean()))


def test_tokens_of_other_models_are_not_shifted() -> None:
    student = Tagger(1)
    expected = F.cross_entropy(student(IDS).flatten(0, 1), IDS.flatten())
    batch = {"input_ids": IDS, "labels": IDS}
    torch.testing.assert_close(kdq.Distiller(Tagger(0), student, [kdq.CrossEntropy()]).loss(batch), expected)
