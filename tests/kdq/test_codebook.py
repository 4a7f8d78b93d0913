"""Weight sharing: k-means against a search of all partitions, centroids' gradients, zeros that stay, and parity."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdq
from kdq.clustering import kmeans, nearest, shared_weights
from kdq.layers import CodebookLinear, CodebookQATLinear
from kdq.search.cost import layer_bytes
from small_models import mlp, randn


def squared_error(values: Tensor, centroids: Tensor) -> float:
    return float((values[:, None].double() - centroids.double()).square().amin(1).sum())


def test_kmeans_finds_what_its_start_allows() -> None:
    """Every cluster's centroid is its mean and every value is at its nearest centroid, whatever the values."""
    for seed, count in itertools.product(range(5), (1, 2, 7, 31)):
        values = torch.cat([randn(300, seed=seed), randn(5, seed=seed + 50) * 20])
        centroids = kmeans(values, count)
        assert torch.equal(centroids, kmeans(values.flip(0), count))
        assert torch.equal(centroids, centroids.sort().values)
        index = nearest(values, centroids)
        assert torch.equal(index, (values[:, None] - centroids).abs().argmin(1))
        means = torch.stack([values[index == i].double().mean() for i in index.unique()])
        torch.testing.assert_close(centroids[index.unique()].double(), means, rtol=1e-6, atol=1e-6)


def test_kmeans_on_separate_groups_is_optimal() -> None:
    values = torch.tensor([-3.0, -2.9, 0.1, 0.2, 0.3, 5.0])
    runs = [torch.tensor_split(values, cuts) for cuts in itertools.combinations(range(1, 6), 2)]
    best = min(squared_error(values, torch.stack([run.mean() for run in parts])) for parts in runs)
    assert squared_error(values, kmeans(values, 3)) == pytest.approx(best)
    assert kmeans(torch.empty(0), 3).tolist() == [0, 0, 0]


def test_exact_zeros_get_a_centroid_of_their_own() -> None:
    weight = randn(8, 9)
    codebook, indices = shared_weights(weight, 3)
    assert (codebook != 0).all()
    assert len(indices.unique()) == 8
    weight[::2] = 0.0
    weight[1, 1] = 1e-20
    codebook, indices = shared_weights(weight, 3)
    assert codebook[0] == 0
    assert torch.equal(indices == 0, weight == 0)
    assert torch.equal(shared_weights(torch.zeros(2, 3), 1)[1], torch.zeros(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 5])
def test_gradient_of_a_centroid_is_the_sum_over_its_weights(bits: int, pruned: bool) -> None:
    linear = nn.Linear(30, 20)
    if pruned:
        with torch.no_grad():
            linear.weight[randn(20, 30) < 0.5] = 0.0
    twin = CodebookQATLinear(linear, kdq.Codebook(weight_bits=bits))
    x, upstream = randn(7, 30), randn(7, 20, seed=1)
    twin(x).backward(upstream)
    grad_weight = upstream.double().t() @ x.double()
    sums = [grad_weight[twin.indices == i].sum() for i in range(2**bits)]
    assert twin.centroids.grad is not None
    assert len(twin.centroids) == 2**bits - pruned
    torch.testing.assert_close(twin.centroids.grad.double(), torch.stack(sums[int(pruned) :]), rtol=1e-4, atol=1e-4)


def finetuned(bits: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor]:
    model, x = mlp(40), randn(23, 6)
    kdq.prune_(model, 0.5)
    kdq.prepare_qat_(model, kdq.Codebook(weight_bits=bits))
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(x.to(dtype)).float().square().mean().backward()
        optimizer.step()
    return model.eval(), x.to(dtype)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_twin_and_kernel_agree(isa: str, bits: int) -> None:
    model, x = finetuned(bits)
    twins = [copy.deepcopy(model[0]), copy.deepcopy(model[2])]
    with torch.no_grad():
        expected = model(x)
        report = kdq.convert_(model)
        assert report.changed == dict.fromkeys(("0", "2"), kdq.Codebook(weight_bits=bits))
        assert report.fused == {"0": "relu"}
        for twin, real in zip(twins, (model[0], model[2]), strict=True):
            assert torch.equal(real.indices(), twin.indices)
            assert torch.equal(real.dequantized_weight(), twin.shared_weight())
            assert float((real.dequantized_weight() == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_agrees_too() -> None:
    model, x = finetuned(4, torch.bfloat16)
    assert model[0].centroids.dtype == torch.float32
    expected = model(x)
    kdq.convert_(model)
    got = model(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03)


@torch.no_grad()
def test_without_training() -> None:
    model, x = mlp(64), randn(9, 6)
    expected = model(x)
    errors = []
    for bits in (1, 3, 5):
        quantized = copy.deepcopy(model)
        kdq.quantize_(quantized, kdq.Codebook(weight_bits=bits))
        assert isinstance(quantized[0], CodebookLinear)
        assert repr(quantized[0]).endswith(f"activation='relu', Codebook(weight_bits={bits}))")
        errors.append(float((quantized(x) - expected).norm() / expected.norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.05


def test_layer_copies_pickles_and_goes_back_to_float() -> None:
    model, x = finetuned(3)
    kdq.convert_(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    plain = nn.Sequential(model[0].to_float(), model[1], model[2].to_float())
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    before = model[0].codebook
    assert model.bfloat16()[0].codebook.dtype == before.dtype == torch.float32


def test_gradient_reaches_the_input() -> None:
    layer = CodebookLinear.from_float(nn.Linear(6, 5))
    x = randn(3, 6).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized_weight().sum(0).expand(3, 6))


def test_twins_at_another_precision() -> None:
    model, x = mlp(20), randn(8, 6)
    kdq.prepare_qat_(model, kdq.Int8WeightOnly())
    kdq.lower_precision_(model, kdq.Codebook(weight_bits=4))
    shared = model[0].shared_weight()
    kdq.lower_precision_(model, kdq.Codebook(weight_bits=4))
    torch.testing.assert_close(model[0].shared_weight(), shared)
    model(x)
    with pytest.raises(ValueError, match="a Codebook trains its values"):
        kdq.prepare_switchable_(mlp(20), [kdq.Int8Dynamic(), kdq.Codebook()])
    with pytest.raises(ValueError, match="no grid to round to"):
        kdq.reconstruct_(mlp(20), kdq.Codebook(), [x])


def test_optimizers_from_before_are_refused() -> None:
    model = mlp(20)
    optimizer = torch.optim.Adam(model.parameters())
    teacher = kdq.self_teacher(model)
    kdq.prepare_qat_(model, kdq.Codebook())
    with pytest.raises(ValueError, match="bias of '0', but not all of its centroids"):
        kdq.Distiller(teacher, model, [kdq.SoftTargets()]).fit([randn(4, 6)], 1, optimizer, progress=False)


def test_size_is_foreseen() -> None:
    for config in (kdq.Codebook(weight_bits=3), kdq.Codebook(weight_bits=5)):
        linear = nn.Linear(70, 33)
        layer = CodebookLinear.from_float(linear, config)
        assert sum(t.nbytes for t in layer.state_dict().values()) == layer_bytes(linear, config)


def test_search_weighs_codebooks_too() -> None:
    model, x = mlp(40), randn(64, 6)
    plan = kdq.search_precision(
        model,
        kdq.self_teacher(model),
        [x],
        budget=kdq.Budget(average_bits=3.0),
        candidates=[kdq.Codebook(weight_bits=bits) for bits in (2, 3, 4)],
        progress=False,
    )
    assert plan.average_bits <= 3.0
    kdq.quantize_(model, plan)
    assert isinstance(model[0], CodebookLinear)


@pytest.mark.parametrize("bits", [0, 6, 2.0, True])
def test_bits_are_checked(bits: object) -> None:
    with pytest.raises(ValueError, match="weight_bits: expected an integer from 1 to 5"):
        kdq.Codebook(weight_bits=bits)  # type: ignore[arg-type]


def test_functional_form() -> None:
    """The forward pass of a twin is F.linear of its shared weight, also on several leading axes."""
    twin = CodebookQATLinear(nn.Linear(6, 5), kdq.Codebook(weight_bits=2))
    x = randn(2, 3, 6)
    assert torch.equal(twin(x), F.linear(x, twin.codebook()[twin.indices.int()], twin.bias))
