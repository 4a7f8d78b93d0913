"""Pruning: the right weights, masks that hold whatever the optimizer does, and the way to the inference layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq.configs import Pruned
from kdq.layers import PrunedLinear
from small_models import mlp, randn


def zeros(model: nn.Module) -> list[Tensor]:
    return [m.effective_weight() == 0 for m in model.modules() if isinstance(m, PrunedLinear)]


def test_the_smallest_of_each_layer() -> None:
    model = mlp(20)
    weights = [model[0].weight.clone(), model[2].weight.clone()]
    x, report = randn(5, 6), kdq.prune_(model, 0.7)
    assert report.changed == {"0": Pruned(sparsity=0.7), "2": Pruned(sparsity=0.7)}
    for layer, weight in zip((model[0], model[2]), weights, strict=True):
        threshold = weight.abs().flatten().kthvalue(round(0.7 * weight.numel())).values
        assert torch.equal(layer.effective_weight(), torch.where(weight.abs() > threshold, weight, 0.0))
    hidden = (x @ model[0].effective_weight().t() + model[0].bias).relu()
    torch.testing.assert_close(model(x), hidden @ model[2].effective_weight().t() + model[2].bias)


def test_one_threshold_for_all() -> None:
    model = mlp(20)
    with torch.no_grad():
        model[2].weight.mul_(10)
    everything = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).abs()
    threshold = everything.sort().values[round(0.6 * everything.numel()) - 1]
    report = kdq.prune_(model, 0.6, scope="global")
    assert report.changed["0"].sparsity > 0.8 > 0.3 > report.changed["2"].sparsity
    for layer in (model[0], model[2]):
        assert torch.equal(layer.pruned, layer.weight.abs() <= threshold)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.05),
    ],
)
def test_masks_hold_with_an_optimizer_from_before(optimizer) -> None:
    """Its momentum moves the parameters of pruned weights; the model must not notice."""
    model, x, y = mlp(20), randn(16, 6), torch.arange(16) % 4
    steps = optimizer(model.parameters())

    def train() -> None:
        for _ in range(5):
            steps.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            steps.step()

    train()
    for sparsity in (0.5, 0.8):
        kdq.prune_(model, sparsity)
        before, values = zeros(model), [p.clone() for p in model.parameters()]
        train()
        assert all(map(torch.equal, zeros(model), before))
        assert all(m[0].grad[m[1]].eq(0).all() for m in zip([model[0].weight, model[2].weight], before, strict=True))
        assert not any(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    assert float(zeros(model)[0].float().mean()) == pytest.approx(0.8)


def test_pruned_weights_do_not_come_back() -> None:
    model = mlp(20)
    kdq.prune_(model, 0.5)
    first = model[0].pruned
    with torch.no_grad():
        model[0].weight[first] = 100.0
    kdq.prune_(model, 0.6)
    assert (model[0].pruned >= first).all()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"60.0% is pruned already, more than 30.0%"):
        kdq.prune_(model, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_filter_and_reasons() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 1), *mlp(20))
    report = kdq.prune_(model, 0.5, lambda _, name: name == "3")
    assert list(report.changed) == ["3"]
    assert report.left == {"0": "Conv1d has no quantized form", "1": "filter_fn is false"}
    with pytest.raises(ValueError, match="no layer to prune: 0: Conv1d"):
        kdq.prune_(nn.Sequential(nn.Conv1d(1, 1, 1)), 0.5)
    for sparsity in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="sparsity: expected from 0 to below 1"):
            kdq.prune_(model, sparsity)
    with pytest.raises(ValueError, match="scope"):
        kdq.prune_(model, 0.5, scope="model")  # type: ignore[arg-type]
    broken = mlp(20)
    with torch.no_grad():
        broken[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="2: its weight contains NaN"):
        kdq.prune_(broken, 0.5)
    assert type(broken[0]) is nn.Linear


def test_a_shared_layer_is_pruned_once() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    kdq.prune_(model, 0.5)
    assert model[0] is model[2]
    assert int(model[0].pruned.sum()) == 18


@pytest.mark.parametrize("config", [kdq.Codebook(weight_bits=3), kdq.Int8WeightOnly()])
def test_other_schemes_take_the_zeros(config) -> None:
    model, x = mlp(20), randn(5, 6)
    kdq.prune_(model, 0.7)
    with torch.no_grad():
        model[0].weight[model[0].pruned] = 3.0  # what an optimizer may leave there
    expected, sparse = model(x).detach(), model[0].pruned
    quantized, prepared = copy.deepcopy(model), copy.deepcopy(model)
    kdq.quantize_(quantized, config)
    kdq.prepare_qat_(prepared, config)
    kdq.convert_(prepared)
    for converted in (quantized, prepared):
        assert (converted[0].dequantized_weight()[sparse] == 0).all()
        assert float((converted(x).detach() - expected).norm() / expected.norm()) < 0.2
    kdq.lower_precision_(model, config)


def test_convert_makes_the_zeros_permanent(tmp_path) -> None:
    model, x = mlp(20), randn(5, 6)
    kdq.prune_(model, 0.7)
    with torch.no_grad():
        model[0].weight[model[0].pruned] = 3.0
    expected = model(x)
    with pytest.raises(ValueError, match="convert_"):
        kdq.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="no linear layer that quantize_"):
        kdq.search_precision(model, mlp(20), [x], budget=kdq.Budget(average_bits=8), progress=False)
    assert kdq.convert_(model).changed == {"0": Pruned(sparsity=0.7), "2": Pruned(sparsity=0.7)}
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), expected)
    assert float((model[0].weight == 0).float().mean()) == pytest.approx(0.7)
    kdq.save(model, tmp_path / "m")
    assert torch.equal(kdq.load(tmp_path / "m")(x), expected)


def test_plan_of_convert_quantizes_pruned_layers() -> None:
    model = mlp(20)
    kdq.prune_(model, 0.5)
    report = kdq.convert_(model, {"0": kdq.Codebook(weight_bits=2)})
    assert report.changed == {"0": kdq.Codebook(weight_bits=2), "2": Pruned(sparsity=0.5)}
    assert isinstance(model[0], kdq.CodebookLinear)


def test_copies_pickles_and_state() -> None:
    model, x = mlp(20), randn(5, 6)
    kdq.prune_(model, 0.5)
    model(x).sum().backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert all(map(torch.equal, zeros(other), zeros(model)))
    again = mlp(20, seed=1)
    kdq.prune_(again, 0.2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_phases_prune_and_share() -> None:
    torch.manual_seed(0)
    model, x = mlp(30), randn(32, 6)
    teacher = kdq.self_teacher(model)
    distiller = kdq.Distiller(teacher, model, [kdq.SoftTargets()])
    phases = kdq.pruning_phases(0.8, epochs=2, steps=3)
    assert [p.sparsity for p in phases] == pytest.approx([0.8 * 19 / 27, 0.8 * 26 / 27, 0.8])
    histories = distiller.run(
        [x, x], [*phases, kdq.Phase("shared", 2, config=kdq.Codebook(weight_bits=3))], progress=False
    )
    assert [h.steps for h in histories] == [4, 4, 4, 4]
    kdq.convert_(model)
    assert float((model[0].dequantized_weight() == 0).float().mean()) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="sparsity"):
        kdq.Phase("too much", 1, sparsity=1.5)
