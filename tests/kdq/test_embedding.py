"""Quantized embeddings: the twin and the packed table agree, rows and gradients are those of the formulas, and the
calls on whole models take embeddings where a pattern names them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq.configs import Config, bits_of
from kdq.grids import weight_range
from kdq.layers.embedding import QATEmbedding, QuantizedEmbedding
from kdq.layers.low_bit_linear import unpack_bits
from kdq.layers.qat_product import gradient_factor
from small_models import randn

CONFIGS: list[Config] = [
    kdq.Int8WeightOnly(),
    kdq.Int8Dynamic(),
    *(kdq.LowBit(weight_bits=bits, act_bits=8) for bits in range(1, 9)),
    kdq.LowBit(weight_bits=2, act_bits=4, method="pact"),
    kdq.Binary(),
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=str)
IDS = torch.tensor([[0, 3, 3, 10], [7, 2, 10, 0]])


class Tagger(nn.Module):
    """Word and position embeddings, and a linear layer on them; 11 words, 5 tags."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.word = nn.Embedding(11, 37, padding_idx=10)
        self.place = nn.Embedding(4, 37)
        self.head = nn.Linear(37, 5)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.word(ids) + self.place(torch.arange(ids.shape[1])))
        return y


def trained(config: Config) -> Tagger:
    """With twins for the embeddings, after a few steps: learned scales are no round numbers."""
    model = Tagger()
    kdq.prepare_qat_(model, {"word": config, "place": config})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
    return model


@every_config
def test_twin_and_packed_table_read_the_same_rows(config: Config) -> None:
    model = trained(config)
    twin: Any = model.word
    with torch.no_grad():
        expected = twin.rounded_weight()
        kdq.convert_(model)
        table: Any = model.word
        assert torch.equal(table(torch.arange(11)), expected)
        assert torch.equal(table(IDS), expected[IDS])
    bits = bits_of(config)[0]
    integers = unpack_bits(table.weight, bits, 37)
    assert torch.equal(integers * table.weight_scale[:, None], expected)
    low, high = (-1, 1) if bits == 1 else weight_range(bits)
    assert integers.min() >= low
    assert integers.max() <= high
    assert table.weight.nbytes == 11 * -(-37 * bits // 8), "rows are kept in their bits"
    assert not expected[10].any(), "the row of padding stays zero"


@every_config
def test_rows_are_near_the_float_ones(config: Config) -> None:
    """The error of the formulas: a uniform step for 8 bits, and never more than the row itself."""
    embedding = nn.Embedding(11, 37)
    table = QuantizedEmbedding.from_float(embedding, config)
    error = (table.dequantized_weight() - embedding.weight).norm(dim=1) / embedding.weight.norm(dim=1)
    bits = bits_of(config)[0]
    assert (error < (0.7 if bits == 1 else 2.2 * 2.0**-bits)).all()
    again = QuantizedEmbedding.from_float(table.to_float(), config)
    assert (again.dequantized_weight() - table.dequantized_weight()).norm() < 1e-2 * table.dequantized_weight().norm()


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_gradients_are_those_of_the_formulas(bits: int) -> None:
    embedding = nn.Embedding(6, 9)
    embedding.weight.data = randn(6, 9) * 0.6
    twin = QATEmbedding(embedding, kdq.LowBit(weight_bits=bits, act_bits=8))
    ids, grad = torch.tensor([1, 4, 1]), randn(3, 9, seed=1)
    twin(ids).backward(grad)
    rows = torch.zeros(6, 9, dtype=torch.double).index_add_(0, ids, grad.double())
    w = embedding.weight.detach().double()
    if bits == 1:
        mean, signs = w.abs().mean(1, keepdim=True), torch.where(w < 0, -1.0, 1.0)
        expected = mean * rows * (w.abs() <= 1) + (rows * signs).sum(1, keepdim=True) / 9 * w.sign()
    else:
        assert twin.weight_scale is not None
        scale = twin.weight_scale.detach().double()[:, None]
        low, high = weight_range(bits)
        v = w / scale
        q = v.round().clamp(low, high)
        inside = v.round() == q
        expected = rows * inside
        of_scale = (rows * torch.where(inside, q - v, q)).sum(1) * gradient_factor(9, high)
        torch.testing.assert_close(twin.weight_scale.grad, of_scale.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedding.weight.grad, expected.float(), rtol=1e-4, atol=1e-5)


def test_one_config_is_for_linear_layers_and_a_pattern_takes_embeddings() -> None:
    report = kdq.quantize_(Tagger(), kdq.Int8Dynamic())
    assert list(report.changed) == ["head"]
    assert "pattern" in report.left["word"]
    model = Tagger()
    report = kdq.quantize_(model, {"word": kdq.LowBit(weight_bits=4, act_bits=8), "*": kdq.Int8Dynamic()})
    assert report.changed["word"] == kdq.LowBit(weight_bits=4, act_bits=8), "without calibration: it has no activations"
    assert report.changed["place"] == report.changed["head"] == kdq.Int8Dynamic()
    assert not report.left
    with pytest.raises(ValueError, match="calibration: 'head'"):
        kdq.quantize_(Tagger(), {"*": kdq.LowBit(weight_bits=4, act_bits=8)})
    again = kdq.quantize_(model, {"*": kdq.Binary()})
    assert again.left["word"] == "already quantized (QuantizedEmbedding)"
    plain = Tagger()
    assert kdq.convert_(plain, {"word": kdq.Binary()}).changed == {"word": kdq.Binary()}


def test_what_has_no_quantized_form_is_left_or_refused() -> None:
    class Custom(nn.Embedding):
        pass

    kinds: dict[str, nn.Module] = {
        "bounded": nn.Embedding(3, 4, max_norm=1.0),
        "sparse": nn.Embedding(3, 4, sparse=True),
        "custom": Custom(3, 4),
        "wide": nn.Embedding(3, 4, dtype=torch.float64),
        "bag": nn.EmbeddingBag(3, 4),
    }
    left = kdq.quantize_(nn.ModuleDict(kinds), {"*": kdq.Binary()}).left
    for name, word in zip(kinds, ("max_norm", "sparse", "subclass", "float64", "EmbeddingBag"), strict=True):
        assert word in left[name]
    model = Tagger()
    before = copy.deepcopy(model)
    dorefa = kdq.LowBit(weight_bits=2, act_bits=2, method="dorefa")
    with pytest.raises(ValueError, match='place: config: method "dorefa"'):
        kdq.prepare_qat_(model, {"head": dorefa, "place": dorefa})
    model.word.weight.data[1] = torch.nan
    with pytest.raises(ValueError, match="word: its weight contains NaN"):
        kdq.quantize_(model, {"*": kdq.Int8Dynamic()})
    assert str(model) == str(before)


@every_config
def test_layers_copy_save_and_load(config: Config, tmp_path: Path) -> None:
    model = trained(config)
    kdq.convert_(model)
    expected = model(IDS)
    assert torch.equal(copy.deepcopy(model)(IDS), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS), expected)
    kdq.save(model, tmp_path / "m")
    assert torch.equal(kdq.load(tmp_path / "m", Tagger(seed=1))(IDS), expected)
    loaded: Any = kdq.load(tmp_path / "m", Tagger(seed=1))
    assert loaded.word.to_float().padding_idx == 10
    rebuildable = nn.Sequential(model.word, nn.Flatten())
    kdq.save(rebuildable, tmp_path / "r")
    assert torch.equal(kdq.load(tmp_path / "r")(IDS), rebuildable(IDS))
    smaller = Tagger()
    smaller.word = nn.Embedding(9, 37)
    with pytest.raises(ValueError, match="layer 'word' is an embedding 11 -> 37"):
        kdq.load(tmp_path / "m", smaller)


def test_dtypes_and_bad_indices(tmp_path: Path) -> None:
    model = Tagger()
    kdq.quantize_(model, {"word": kdq.Binary(), "place": kdq.Int8Dynamic()})
    kdq.save(model, tmp_path / "m")
    half = copy.deepcopy(model).bfloat16()
    table: Any = half.word
    assert table.weight_scale.dtype == torch.float32, "scales are not rounded with the model"
    assert half(IDS).dtype == torch.bfloat16
    into: Any = kdq.load(tmp_path / "m", Tagger().bfloat16())
    assert into(IDS).dtype == torch.bfloat16
    assert table(IDS[:0]).shape == (0, 4, 37)
    assert table(torch.tensor(3, dtype=torch.int32)).shape == (37,)
    with pytest.raises(TypeError, match="ids: expected int32 or int64"):
        table(IDS.float())
    for wrong in (11, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([wrong]))


def test_embeddings_in_the_rest_of_the_library(tmp_path: Path) -> None:
    """Distilling, lowering the precision, the report by layer, and the search, which chooses for linear layers."""
    teacher, student = Tagger(), Tagger()
    kdq.prepare_qat_(student, {"word": kdq.LowBit(weight_bits=4, act_bits=8), "head": kdq.Int8Dynamic()})
    with pytest.raises(ValueError, match="saving"):
        kdq.save(student, tmp_path / "m")
    with pytest.raises(ValueError, match="'word' is already a QATEmbedding"):
        kdq.self_teacher(student)
    weight = student.get_parameter("word.weight")
    with pytest.raises(ValueError, match="'word', but not all of its learned scales"):
        kdq.Distiller(teacher, student, [kdq.SoftTargets()]).fit([IDS], 1, torch.optim.SGD([weight], lr=0.1))
    kdq.Distiller(teacher, student, [kdq.SoftTargets()]).fit([IDS], epochs=2, progress=False)
    assert kdq.lower_precision_(student, {"word": kdq.Binary()}).changed == {"word": kdq.Binary()}
    assert student.get_parameter("word.weight") is weight
    kdq.convert_(student)
    errors = kdq.report(student, teacher, [IDS]).layers
    assert [(e.name, e.kind) for e in errors] == [("word", "QuantizedEmbedding"), ("head", "Int8Linear")]
    mixed = Tagger()
    kdq.quantize_(mixed, {"word": kdq.Binary()})
    plan = kdq.search_precision(mixed, teacher, [IDS], budget=kdq.Budget(average_bits=4), rounds=1, progress=False)
    kdq.quantize_(mixed, plan, calibration=[IDS])
    assert plan.size_bytes == sum(tensor.nbytes for tensor in mixed.state_dict().values())


def test_compiles_and_exports() -> None:
    model = nn.Sequential(nn.Embedding(11, 37))
    kdq.quantize_(model, {"*": kdq.Binary()})
    torch.compiler.reset()  # all models here share the code of nn.Sequential, and its recompilations are counted
    compiled = torch.compile(model, fullgraph=True)
    assert torch.equal(compiled(IDS), model(IDS))
    assert torch.equal(torch.export.export(model, (IDS,)).module()(IDS), model(IDS))
    torch.compiler.reset()
